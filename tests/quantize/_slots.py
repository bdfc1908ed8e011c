"""Bundles with slots of codes, of scales that the test gives; `build` finds them on data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests._tiny import RECIPE

if TYPE_CHECKING:
    from tmc_export.bundle.program import Program, SlotCodes
    from tmc_export.plan.types import Plan
    from tmc_export.runtime._backend import Backend
    from tmc_export.verify.recorded import Case

__all__ = [
    "DATA", "FASTV", "KV", "TEXT_KV", "TOPS", "Scales", "answered", "build_coded", "failures", "given_scales", "kv", "operators", "peaks",
    "plan_of", "recipe", "types",
]  # fmt: skip

FASTV = "{at: decoder.1, method: fastv, keep: 4}"

Scales = dict[str, tuple[float, ...]]

TOPS = {"int8": 127, "fp8": 448}
DATA = "calibration: {images: pictures, prompts: prompts.jsonl}"
KV = f"{{kv: {{weights: int8}}, {DATA}}}"
TEXT_KV = "{kv: {weights: int8}, calibration: {prompts: prompts.jsonl}}"
"""The same without pictures."""


def kv(codes: str) -> str:
    """The recipe's `quantize` for slots of these codes."""
    return KV.replace("int8", codes)


def peaks(model: Path, recipe: Path, codes: str = "int8") -> Scales:
    """Scales that hold all that the reference makes of made-up conversations."""
    from tmc_export.plan.make import make_plan
    from tmc_export.plan.source import read_model_files
    from tmc_export.recipe import load_recipe
    from tmc_export.verify.record import answer, made_up_scripts
    from tmc_export.verify.reference import Reference

    files = read_model_files(model)
    plan, _ = make_plan(load_recipe(recipe), files)
    reference, top = Reference(model, plan, trace=True), dict[str, np.ndarray]()
    for script in made_up_scripts(model, plan, files):
        for turn in answer(reference, script, plan, 1).turns:
            for block in turn.expected.blocks:
                for kind, rows in (("key", block.keys), ("value", block.values)):
                    for layer, each in rows.items():
                        top[f"{layer}.{kind}"] = np.maximum(top.get(f"{layer}.{kind}", 0.0), np.abs(each).max((1, 2)))
    return {name: tuple((each / TOPS[codes]).tolist()) for name, each in top.items()}


@contextmanager
def given_scales(scales: Mapping[str, tuple[float, ...]] | None) -> Iterator[None]:
    """While active, calibration finds these scales, without data."""
    from tmc_export.api import bundling, calibrate
    from tmc_export.quantize.calibrated import Calibrated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundling, "samples_of", lambda recipe: [])
        patch.setattr(calibrate, "calibrate", lambda *given: Calibrated(slots=scales or {}))
        yield


def build_coded(recipe: Path, out: Path, scales: Mapping[str, tuple[float, ...]] | None, record: bool = False) -> Path:
    """Build a recipe with these scales."""
    from tmc_export.api.bundling import build_bundle

    with given_scales(scales):
        return build_bundle(recipe, out, record=record, engines=False, force=True).folder


def recipe(folder: Path, name: str, compress: str = FASTV, quantize: str = KV, dtype: str = "float32", text: str = RECIPE) -> Path:
    """Write the smallest recipe, some of it changed."""
    changed = text.replace(FASTV, compress).replace("quantize: {}", f"quantize: {quantize}").replace("dtype: float32", f"dtype: {dtype}")
    path = folder / f"{name}.yaml"
    path.write_text(changed, "utf-8")
    return path


def plan_of(path: Path, model: Path) -> Plan:
    """The plan of a recipe for a model."""
    from tmc_export.plan.make import make_plan
    from tmc_export.plan.source import read_model_files
    from tmc_export.recipe import load_recipe

    return make_plan(load_recipe(path), read_model_files(model))[0]


def operators(bundle: Path, file: str) -> list[str]:
    """The operators of a graph of a bundle."""
    import onnx

    return [node.op_type for node in onnx.load(bundle / file, load_external_data=False).graph.node]


def types(bundle: Path, file: str) -> dict[str, int]:
    """What a graph's inputs and outputs are of."""
    import onnx

    graph = onnx.load(bundle / file, load_external_data=False).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}


def answered(path: Path, model: Path, codes: SlotCodes | None, script: str = "one", steps: int = 3) -> list[Case]:
    """A made-up conversation, answered by the reference with these codes."""
    from tmc_export.plan.source import read_model_files
    from tmc_export.verify.record import answer, made_up_scripts
    from tmc_export.verify.reference import Reference

    plan, files = plan_of(path, model), read_model_files(model)
    reference = Reference(model, plan, trace=True, codes=codes)
    return [answer(reference, s, plan, steps) for s in made_up_scripts(model, plan, files) if s.name == script]


def failures(bundle: Path, program: Program, cases: list[Case], backend: Backend | None = None) -> list[str]:
    """What `verify` says of a bundle's subgraphs, fed with what the reference had."""
    from tmc_export.verify.subgraphs import check_subgraphs
    from tmc_export.verify.tolerances import tolerance

    row = f"{program.slot_kind} slots"
    checks = check_subgraphs(bundle, program, cases, tolerance("subgraph", row), row, backend)
    return [f"{c.name}: {c.note}" for c in checks if not c.passed]
