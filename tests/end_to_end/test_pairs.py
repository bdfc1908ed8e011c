"""Pairs of methods on a small LLaVA: what `plan` does not refuse is built, and answers as the reference does.

`tests/plan/test_pairs.py` compares the plans of all ordered pairs with the table. Where two entries share no site it also shows that both
orders have one plan, so that one of them is built here, and `test_both_orders_are_one_bundle` shows for some that the graphs are the same
bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests._traced import traced_once  # noqa: E402
from tests.end_to_end._pairs import BUILT, CONFIG, write_pair  # noqa: E402
from tests.families._small import save_small_llava  # noqa: E402
from tmc_export import api  # noqa: E402
from tmc_export.api.bundling import BuildResult  # noqa: E402
from tmc_export.core.errors import LegalityError  # noqa: E402

QUICK = (("mustdrop", "fastv"), ("llava_mini", "sparsevlm"), ("downsample", "downsample"))
"""Built in the quick suite: a state into a cut where another method acts; replaced text that another one reads; two stages on pixels."""

ONE_BUNDLE = (("downsample", "pyramiddrop"), ("tome", "fastv"), ("visionzip", "tokencarve"))
"""No site in common, nothing random, no state whose name holds the entry's number."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    save_small_llava(folder / "model")
    return folder


@pytest.fixture(scope="module", autouse=True)
def equal_graphs_traced_once() -> Iterator[None]:
    """Pairs have graphs in common: a stretch of decoder layers, a vision graph."""
    with traced_once():
        yield


def build(folder: Path, *pair: str) -> BuildResult:
    """Build a pair; raises when the bundle's recorded answers are not the reference's."""
    return api.build(write_pair(folder, *pair), folder / "-".join(pair), engines=False)


def check(folder: Path, *pair: str) -> None:
    result = build(folder, *pair)
    said = result.manifest.proofs["onnxruntime end to end"]
    shutil.rmtree(result.folder)
    assert said.startswith("passed; ") and "prefilled whole and in chunks" in said, said


def test_the_plans_are_those_of_this_model(folder: Path) -> None:
    for name in ("config.json", "processor_config.json"):
        here, there = (json.loads((f / name).read_text("utf-8")) for f in (folder / "model", CONFIG))
        assert {**here, "transformers_version": ""} == {**there, "transformers_version": ""}


@pytest.mark.parametrize("pair", QUICK, ids="+".join)
def test_some_pairs_are_built_and_verified(pair: tuple[str, str], folder: Path) -> None:
    assert pair in BUILT
    check(folder, *pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [p for p in BUILT if p not in QUICK], ids="+".join)
def test_every_pair_is_built_and_verified(pair: tuple[str, str], folder: Path) -> None:
    check(folder, *pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ONE_BUNDLE, ids="+".join)
def test_both_orders_are_one_bundle(pair: tuple[str, str], folder: Path) -> None:
    graphs = []
    for order in (pair, pair[::-1]):
        result = build(folder, *order)
        graphs.append({p.name: p.read_bytes() for p in sorted((result.folder / "onnx").iterdir())})
        shutil.rmtree(result.folder)
    assert graphs[0] == graphs[1] and len(graphs[0]) > 10


def test_a_pair_that_cannot_work_is_refused_before_anything_is_exported(folder: Path) -> None:
    with pytest.raises(LegalityError, match="'random' at projector changes them in between"):
        build(folder, "adafv", "random")
    assert not (folder / "adafv-random").exists()
