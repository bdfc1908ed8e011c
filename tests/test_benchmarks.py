"""What the benchmarks say of the methods holds without a run."""

from __future__ import annotations

import math

import pytest

from benchmarks._answers import divergence, overlap
from benchmarks._selector import Entry
from benchmarks._selector_cases import CASES, LARGE, PATCHES
from benchmarks.schemes_accuracy import SCHEMES, wants_data
from tmc_export.graphs import METHODS
from tmc_export.plan.quantization import needs_calibration
from tmc_export.recipe import QuantizePart

SELECTING = ("similarity", "attention")


def test_every_method_that_selects_or_merges_has_its_selector_timed() -> None:
    wanted = {n for n in METHODS if METHODS.get(n).modality == "image" and METHODS.get(n).mechanism in SELECTING}
    wanted |= {n for n in METHODS if METHODS.get(n).mechanism == "query" and METHODS.get(n).training_free}
    assert wanted <= set(CASES) <= {*wanted, "random"}


def test_only_the_named_methods_may_be_above_the_bound() -> None:
    above = {(name, size) for name, case in CASES.items() for size in case.above}
    assert above <= {(n, s) for n in ("tokencarve", "topv") for s in (PATCHES, LARGE)} | {("divprune", LARGE)}


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, case in CASES.items() for size in case.sizes])
def test_about_a_quarter_stays_and_the_layers_say_so(name: str, size: int) -> None:
    layers = Entry(name, size).layers()
    assert len(layers) == 24 and layers == sorted(layers, reverse=True)
    last = {"vtw": 0.0, "pyramiddrop": 0.125, "sparsevlm": 0.2}.get(name, 0.25)
    assert layers[-1] == pytest.approx(last * size, abs=0.01 * size)


def test_answers_are_compared() -> None:
    base = {"first": [[math.log(0.5), math.log(0.5)], [math.log(0.9), math.log(0.1)]], "kept": [[[1, 2], []], [[3, 4], []]]}
    other = {"first": [[math.log(0.5), math.log(0.5)], [math.log(0.1), math.log(0.9)]], "kept": [[[2, 1], []], [[3, 9], []]]}
    assert divergence(base, base) == (0.0, 1.0) and overlap(base, base) == 1.0
    kl, same = divergence(other, base)
    assert kl == pytest.approx(0.8 * math.log(9) / 2) and same == 0.5
    assert overlap(other, base) == 0.75 and overlap({"kept": [[]]}, {"kept": [[]]}) is None


def test_only_schemes_that_need_data_get_some() -> None:
    wanting = {name for name, quantize in SCHEMES.items() if wants_data(quantize)}
    assert wanting == {"int8-w8a8", "int8-w8a8-smooth", "fp8-w8a8", "int4-awq", "int4-gptq", "int8-slots"}
    assert all(
        not needs_calibration(part, QuantizePart(**scheme)) for name in set(SCHEMES) - wanting for part, scheme in SCHEMES[name].items()
    )
