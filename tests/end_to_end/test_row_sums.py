"""Sums over the rows of a layer's map, made by its own block: bundle = reference, with two pictures, later turns and chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tmc_export.runtime._decoder as decoder  # noqa: E402
from tests.end_to_end._probes import register_probes  # noqa: E402
from tests.end_to_end._proof import TABLE, Built, bucket_differences, build, first_kept, prove, reference_cases, unanswered  # noqa: E402
from tests.end_to_end._tiny import MODEL, conversations, pairs  # noqa: E402
from tmc_export.verify.play import play  # noqa: E402
from tmc_export.verify.record import answer  # noqa: E402
from tmc_export.verify.reference import Reference  # noqa: E402
from tmc_export.verify.subgraphs import check_subgraphs  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

SUMS = (
    "{at: decoder.1, method: rows_probe, rows: text, heads: max, row_sum: true, pair: true, keep: 60%}",
    "{at: decoder.2, method: rows_probe, rows: all, heads: mean, keep: 60%}",
    "{at: decoder.3, method: rows_probe, rows: visual, row_sum: true, heads: none, keep: 50%}",
)
TWO = {"images": 2, "text_tokens": 64}
ENGINE = {"device": "rtx-4090", "runtime": "tensorrt-rtx"}


@pytest.fixture(scope="module", autouse=True)
def probes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register_probes(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sums")


@pytest.fixture(scope="module")
def sums(folder: Path) -> Built:
    return build(folder, "sums", MODEL, SUMS, TWO)


def test_sums_with_two_pictures_and_later_turns(sums: Built) -> None:
    program = sums.load().program
    assert [c.sums for c in program.cuts] == [2, 1, 1] and not any(c.previous for c in program.cuts)
    proof, _ = prove(sums, conversations(), steps=4)
    assert not proof.failures, "\n".join(proof.failures[:5])
    assert proof.steps and len(proof.exceptions) <= 0.04 * max(proof.kept, 50), proof.exceptions


def test_every_subgraph_alone_and_its_sums(sums: Built) -> None:
    reference = Reference(sums.model, sums.plan, trace=True)
    cases = [answer(reference, script, sums.plan, 2) for script in (conversations()[0], conversations()[2])]
    checks = list(check_subgraphs(sums.folder, sums.load().program, cases, TABLE, "float32"))
    assert not [f"{c.name}: {c.note}" for c in checks if not c.passed]
    assert len([c for c in checks if "/sum of" in c.name]) == 2 * 2 * 4, "two cases, prefill and chunk, four sums"
    wrong = [answer(reference, script, sums.plan, 2) for script in conversations()[:1]]
    trace = wrong[0].turns[0].expected.blocks[0]
    trace.queries[0][:, 3] *= -1.0  # the negative twin: one row of the reference's map is another
    failed = [c.name for c in check_subgraphs(sums.folder, sums.load().program, wrong, TABLE, "float32") if not c.passed]
    assert any("/sum of" in name for name in failed), failed


def test_a_slot_off_is_found(sums: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: pieces of a turn add to the columns beside their own."""
    cases = reference_cases(sums, conversations()[:1], 1)
    assert all(c.passed for c in play(sums.load(), cases, TABLE, "float32", "chunked"))
    right = decoder.columns_of_turn
    monkeypatch.setattr(decoder, "columns_of_turn", lambda *given: np.roll(right(*given), 1, -1))
    failed = [c.name for c in play(sums.load(), cases, TABLE, "float32", "chunked") if not c.passed]
    assert any("rows_probe at decoder.1" in name for name in failed), failed


def test_an_engine_s_bundle_keeps_the_same_by_its_side_path(sums: Built, folder: Path) -> None:
    """Recipes for TensorRT compute the map once more in the compress graph: the same tokens stay."""
    other = build(folder, "engine", MODEL, SUMS, TWO, ENGINE)
    program = other.load().program
    assert not any(c.sums for c in program.cuts) and all(c.previous for c in program.cuts)
    for script in pairs(3):
        turn: Any = unanswered(script)
        for route in ("whole", "chunked"):
            assert first_kept(sums.load(), turn, route) == first_kept(other.load(), turn, route)


@pytest.mark.slow
def test_kept_tokens_do_not_change_with_the_bucket(folder: Path) -> None:
    small = build(folder, "sums-32", MODEL, SUMS, {"text_tokens": 32})
    large = build(folder, "sums-96", MODEL, SUMS, {"text_tokens": 96, "images": 2, "chunk": 48})
    wrong, ties = bucket_differences(small, large, pairs(12))
    assert not wrong and len(ties) <= 1


def test_tensorrt_rtx_builds_a_compress_graph_of_sums(sums: Built) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    import onnx

    from tests.graphs._checks import wrong_engine

    assert wrong_engine(onnx.load(sums.folder / "onnx" / "compress_1.onnx")) == []
