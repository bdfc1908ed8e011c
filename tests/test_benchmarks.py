"""What the benchmarks say of the methods holds without a run."""

from __future__ import annotations

import pytest

from benchmarks._selector import CASES, LARGE, PATCHES, Entry
from tmc_export.graphs import METHODS

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
