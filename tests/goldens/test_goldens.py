"""Every case of every golden file with an adapter: our method against the official code, in PyTorch and in onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.goldens._cases import Case, NotCovered, adapter, load, pairs, prepared
from tests.goldens._compare import differences
from tests.graphs._onnx import cached_export, execute


def _cases() -> Iterator[Case]:
    for method in pairs():
        if adapter(method) is not None:
            yield from load(method)


CASES = [case for case in _cases() if case.raises is None]
RAISING = [case for case in _cases() if case.raises is not None]


def _covered() -> list[Case]:
    found = []
    for case in CASES:
        try:
            prepared(case)
        except NotCovered:
            continue
        found.append(case)
    return found


COVERED = _covered()


def _onnx_params() -> list[object]:
    """The smallest covered case of each method is quick, the others are slow."""
    smallest: dict[str, Case] = {}
    for case in COVERED:
        size = sum(a.size for a in case.inputs.values())
        known = smallest.get(case.method)
        if known is None or size < sum(a.size for a in known.inputs.values()):
            smallest[case.method] = case
    chosen = {case.id for case in smallest.values()}
    return [pytest.param(case, id=case.id, marks=() if case.id in chosen else pytest.mark.slow) for case in COVERED]


def _eager(case: Case) -> dict[str, np.ndarray]:
    program = prepared(case)
    with torch.no_grad():
        outputs = program.run(program.inputs) | (program.details(program.inputs) if program.details else {})
    return {name: value.numpy() for name, value in outputs.items()}


def test_there_are_goldens() -> None:
    assert COVERED, "no golden case was found: tests/goldens/data or TMC_GOLDENS is empty"


@pytest.mark.parametrize("case", COVERED, ids=lambda case: case.id)
def test_eager_equals_the_official_code(case: Case) -> None:
    assert differences(case, prepared(case), _eager(case)) == []


@pytest.mark.parametrize("case", _onnx_params())
def test_onnxruntime_equals_the_official_code(case: Case, request: pytest.FixtureRequest) -> None:
    program = prepared(case)
    folder = Path(request.config.cache.mkdir("goldens"))
    model = cached_export(program.run, program.inputs, case.id, folder)
    details = program.details(program.inputs) if program.details else {}
    assert differences(case, program, execute(model, program.inputs), without=list(details)) == []


@pytest.mark.parametrize("case", RAISING, ids=lambda case: case.id)
def test_what_the_official_code_fails_on_is_refused(case: Case) -> None:
    try:
        with pytest.raises(ValueError, match="[a-z]+ .*;|use|lower|raise|set"):
            program = prepared(case)
            program.run(program.inputs)
    except NotCovered as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", [c for c in COVERED if c.decided], ids=lambda case: case.id)
def test_a_changed_output_is_found(case: Case) -> None:
    """The negative twin: one changed entry of any output fails the comparison."""
    program, got = prepared(case), _eager(case)
    for name in got:
        if not got[name].size:
            continue
        changed = got[name].copy()
        flat = changed.reshape(-1)
        middle = flat.size // 2
        flat[middle] = not flat[middle] if flat.dtype == bool else flat[middle] + 1
        assert differences(case, program, {**got, name: changed}), f"a changed {name} passed"
    assert differences(case, program, {name: value for name, value in list(got.items())[1:]}), "a missing output passed"
