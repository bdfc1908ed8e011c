"""What the benchmarks say of methods and schemes holds without a run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks._selector import Entry
from benchmarks._selector_cases import CASES, LARGE, PATCHES
from benchmarks.decode_width import row_of as row_of_width
from benchmarks.engine_matrix import CARDS, LAYERS, PHASES, SCHEMES, row_of
from tmc_export.graphs import METHODS
from tmc_export.recipe._schemes import BUILT

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


def test_the_matrix_of_engines_has_every_scheme() -> None:
    parts = [part for scheme in SCHEMES.values() for part in scheme.parts.values()]
    assert {part["weights"] for part in parts} == set(BUILT)
    assert {part["activations"] for part in parts if "activations" in part} == {"int8", "fp8", "nvfp4"}
    assert {part["algorithm"] for part in parts if "algorithm" in part} == {"awq", "gptq"}
    assert {f"SM{number.replace('.', '')}" for _, number in CARDS.values()} == set(CARDS) == {"SM86", "SM89", "SM120"}


def engine(**other: Any) -> dict[str, Any]:
    """What is measured of an engine that meets every bound."""
    kernels = PHASES * LAYERS * 4
    return {
        "scheme": "nvfp4 w4a4", "card": "SM120", "block_weights_bytes": {"block_0": 100}, "readers": kernels, "products": kernels,
        "fused_attention": PHASES * LAYERS, "engines": {"block_0": {"bytes": 105, "seconds": 1.0, "peak_rss": 1 << 30}}, **other,
    }  # fmt: skip


@pytest.mark.parametrize(
    "worse",
    [
        {"engines": {"block_0": {"bytes": 200, "seconds": 1.0, "peak_rss": 1 << 30}}},  # weights stored twice
        {"readers": PHASES * LAYERS * 4 - 1},
        {"products": PHASES * LAYERS * 4 - 1},
        {"fused_attention": PHASES * LAYERS - 1},
    ],
)
def test_the_matrix_judges_each_of_its_figures(worse: dict[str, Any]) -> None:
    assert row_of(engine())["ok"] and not row_of(engine(**worse))["ok"]


def test_the_matrix_wants_refusals_at_a_line() -> None:
    said = {"scheme": "fp8", "card": "SM86", "refused": "fp8-SM86.yaml:6:20: fp8 does not build"}
    assert row_of(said)["ok"] and not row_of({**said, "refused": "fp8 does not build: no line"})["ok"]


def test_the_decode_width_is_judged_by_what_width_two_stores() -> None:
    def entries(two: int) -> list[dict[str, Any]]:
        return [{"scheme": "int4", "width": w, "weights_bytes": 100, "engine_bytes": b} for w, b in ((1, 200), (2, two), (4, 100))]

    assert row_of_width(entries(101))["ok"] and not row_of_width(entries(200))["ok"]
