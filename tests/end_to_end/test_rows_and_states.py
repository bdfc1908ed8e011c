"""Attention rows and states at cuts: bundle = reference on the small LLaVA; two pictures, later turns, chunks; wrong ones are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.end_to_end._probes import register_probes  # noqa: E402
from tests.end_to_end._proof import TABLE, Built, Proof, bucket_differences, build, prove, reference_cases  # noqa: E402
from tests.end_to_end._tiny import MODEL, conversations, pairs  # noqa: E402
from tmc_export.runtime._decoder import Decoder  # noqa: E402
from tmc_export.verify.play import play  # noqa: E402
from tmc_export.verify.record import answer  # noqa: E402
from tmc_export.verify.reference import Reference  # noqa: E402
from tmc_export.verify.subgraphs import check_subgraphs  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

ROWS: dict[str, tuple[str, ...]] = {
    "rows": (
        "{at: decoder.1, method: rows_probe, rows: text, heads: none, keep: 60%}",
        "{at: decoder.2, method: rows_probe, layer: next, rows: text, heads: max, row_sum: true, pair: true, keep: 60%}",
        "{at: decoder.3, method: rows_probe, rows: window, window: 6, heads: sum, keep: 50%}",
    ),
    "more-rows": (
        "{at: decoder.0, method: rows_probe, layer: next, rows: window, window: 5, row_sum: true, keep: 70%}",
        "{at: decoder.1, method: rows_probe, layer: next, rows: text, logits: true, keep: 60%}",
        "{at: decoder.2, method: rows_probe, rows: all, heads: max, keep: 60%}",
        "{at: decoder.3, method: rows_probe, rows: visual, row_sum: true, heads: none, logits: true, keep: 50%}",
    ),
    "joint-rows": ("{at: decoder.2, method: rows_probe, rows: text, row_sum: true, scope: joint, keep: 50%}",),
}
STATES: dict[str, tuple[str, ...]] = {
    "cut-to-cut": (
        "{at: decoder.0, method: raters_probe, layers: [1, 3]}",
        "{at: decoder.2, method: rows_probe, rows: last, keep: 100%}",
    ),
    "encoder-to-decoder": (
        "{at: decoder.1, method: rows_probe, rows: last, keep: 100%}",
        "{at: encoder, method: encoder_probe, layer: 2}",
    ),
}
TWO = {"images": 2, "text_tokens": 64}


@pytest.fixture(scope="module", autouse=True)
def probes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register_probes(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Built:
    return build(folder, "rows", MODEL, ROWS["rows"], TWO)


@pytest.fixture(scope="module")
def handing(folder: Path) -> dict[str, Built]:
    return {name: build(folder, name, MODEL, entries, TWO) for name, entries in STATES.items()}


def check(proof: Proof) -> None:
    assert not proof.failures, "\n".join(proof.failures[:5])
    assert proof.steps and proof.kept
    assert len(proof.exceptions) <= 0.04 * max(proof.kept, 50), proof.exceptions


# ---------------------------------------------------------------------------------------------------------------- rows
def test_rows_with_two_pictures_and_later_turns(rows: Built) -> None:
    proof, _ = prove(rows, conversations(), steps=4)
    check(proof)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["more-rows", "joint-rows"])
def test_more_rows_with_two_pictures_and_later_turns(name: str, folder: Path) -> None:
    proof, _ = prove(build(folder, name, MODEL, ROWS[name], TWO), conversations(), steps=4)
    check(proof)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "more-rows"])
def test_kept_tokens_do_not_change_with_the_bucket(name: str, folder: Path) -> None:
    small = build(folder, f"{name}-32", MODEL, ROWS[name], {"text_tokens": 32})
    large = build(folder, f"{name}-96", MODEL, ROWS[name], {"text_tokens": 96, "images": 2, "chunk": 48})
    wrong, ties = bucket_differences(small, large, pairs(12))
    assert not wrong and len(ties) <= 1


def test_rows_of_padding_that_count_are_found(rows: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: places of padding said to be text tokens, as a wrong mask would have them."""
    cases = reference_cases(rows, conversations()[:1], 1)
    assert all(c.passed for c in play(rows.load(), cases, TABLE, "float32"))
    right = Decoder._text

    def wrong(self: Decoder, cut: Any, flow: Any) -> dict[str, Any]:
        given = right(self, cut, flow)
        visual = np.flatnonzero(flow.group)[-1:]
        return (
            {"text_places": np.where(given["text_valid"], given["text_places"], visual), "text_valid": np.ones_like(given["text_valid"])}
            if given
            else given
        )

    monkeypatch.setattr(Decoder, "_text", wrong)
    failed = [c.name for c in play(rows.load(), cases, TABLE, "float32") if not c.passed]
    assert any("rows_probe at decoder.1" in name for name in failed), failed


def test_more_text_than_the_cut_reads_is_refused(rows: Built) -> None:
    """One picture of two leaves room in the bucket that the text rows do not have."""
    from tmc_export.core.errors import RuntimeInputError

    session = rows.load()
    ids = [*([9] * 65), session.program.image_token]
    turn = conversations()[2].turns[0]
    pixels = [(b, p[None]) for b, p in turn[0]]
    with pytest.raises(RuntimeInputError, match="65 text tokens beside pictures, the cut at layer 1 reads 64"):
        session.run_prompt(session.prompt(ids, pixels))
    session.run_prompt(session.prompt(ids[1:], pixels))


# -------------------------------------------------------------------------------------------------------------- states
@pytest.mark.parametrize("name", STATES)
def test_states_with_two_pictures_and_later_turns(name: str, handing: dict[str, Built]) -> None:
    proof, _ = prove(handing[name], conversations(), steps=4)
    check(proof)


def test_the_program_says_what_is_handed_on(handing: dict[str, Built]) -> None:
    program = handing["cut-to-cut"].load().program
    said = [([s.name for s in c.entering], [s.name for s in c.leaving]) for c in program.cuts]
    both = ["raters", "order"]
    assert said == [([], both), (both, both), ([], []), (both, [])]
    assert [s.shape for s in program.cuts[0].leaving] == [(2, 64), (2, 196)] and program.cuts[0].leaving[0].dtype == "bool"
    assert [s.shape for s in program.cuts[3].entering] == [(2, 64), (2, 118)]
    program = handing["encoder-to-decoder"].load().program
    assert [(s.name, s.shape) for s in program.vision[0].states] == [("mass", (1, 196)), ("largest", (1,))]
    assert [[(s.name, s.shape) for s in c.entering] for c in program.cuts] == [[], [("mass", (2, 196)), ("largest", (2,))]]
    assert program.cuts[1].entering[0].input == "past_state.1.mass"


@pytest.mark.parametrize("name", STATES)
def test_every_subgraph_alone_and_its_states(name: str, handing: dict[str, Built]) -> None:
    built = handing[name]
    reference = Reference(built.model, built.plan, trace=True)
    cases = [answer(reference, script, built.plan, 2) for script in (conversations()[0], conversations()[2])]
    checks = list(check_subgraphs(built.folder, built.load().program, cases, TABLE, "float32"))
    assert not [f"{c.name}: {c.note}" for c in checks if not c.passed]
    states = [c.name for c in checks if "/state." in c.name]
    assert len(states) == {"cut-to-cut": 2 * 2 * 3, "encoder-to-decoder": 2 * 3}[name], states


@pytest.mark.parametrize(
    ("name", "where"), [("cut-to-cut", "raters_probe at decoder.1"), ("encoder-to-decoder", "encoder_probe at decoder.2")]
)
def test_another_state_is_found(name: str, where: str, handing: dict[str, Built], monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: the pictures' states change places on their way into the cut."""
    built = handing[name]
    cases = reference_cases(built, conversations()[:1], 1)
    right = Decoder._cut

    def wrong(self: Decoder, cut: Any, flow: Any, *rest: Any) -> Any:
        if cut.entering:
            flow.states = {k: np.ascontiguousarray(v[::-1]) if v.shape[1:] != (64,) else ~v for k, v in flow.states.items()}
        return right(self, cut, flow, *rest)

    monkeypatch.setattr(Decoder, "_cut", wrong)
    failed = [c.name for c in play(built.load(), cases, TABLE, "float32") if not c.passed]
    assert any(where in n for n in failed), failed


def test_tensorrt_rtx_parses_and_builds_blocks_of_rows(rows: Built, handing: dict[str, Built]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    import onnx

    from tests.graphs._checks import wrong_engine

    for built, cut in ((rows, 2), (handing["cut-to-cut"], 1)):
        model = onnx.load(built.folder / "onnx" / f"compress_{cut}.onnx")
        assert wrong_engine(model) == []
