"""What a decoder cut may do to the sequence, on the shipped small LLaVA: bundle = reference, token for token and logits at every step.

One and two pictures, a picture that is missing, later turns with and without one, whole and chunked; and that each kind of mistake is
found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests._sequence_methods import Mean, sequence_methods  # noqa: E402
from tests.end_to_end._proof import TABLE, Built, build, prove, reference_cases  # noqa: E402
from tests.end_to_end._tiny import MODEL, conversations, pairs  # noqa: E402
from tmc_export.core.errors import RuntimeInputError  # noqa: E402
from tmc_export.runtime._decoder import Decoder  # noqa: E402
from tmc_export.verify import _decode, _sequence  # noqa: E402
from tmc_export.verify.ladder import climb  # noqa: E402
from tmc_export.verify.play import play  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

EFFECTS: dict[str, tuple[str, ...]] = {
    "none-left": ("{at: decoder.2, method: test_nothing}",),
    "fastv-then-none": ("{at: decoder.1, method: fastv, keep: 50%}", "{at: decoder.3, method: test_nothing}"),
    "synthetic": ("{at: decoder.2, method: test_mean, keep: 30, made: 3}",),
    "only-synthetic-room": ("{at: decoder.1, method: test_mean, keep: 192, made: 4}",),
    "synthetic-twice": (
        "{at: decoder.1, method: test_mean, keep: 60, made: 4, positions: truncate}",
        "{at: decoder.3, method: test_mean, keep: 20, made: 2, positions: truncate}",
    ),
    "synthetic-renumbered": ("{at: decoder.2, method: test_mean, keep: 30, made: 3, positions: renumber}",),
    "truncated": ("{at: decoder.2, method: test_mean, keep: 40, made: 0, positions: truncate}",),
    "truncated-then-kept": (
        "{at: decoder.1, method: test_mean, keep: 40, made: 0, positions: truncate}",
        "{at: decoder.3, method: test_mean, keep: 10, made: 2}",
    ),
    "synthetic-and-kv": ("{at: decoder.2, method: test_mean, keep: 30, made: 3, kv: true}",),
    "truncated-and-kv": ("{at: decoder.2, method: test_mean, keep: 30, made: 0, kv: true, positions: truncate}",),
    "two-stages-at-one-cut": (
        "{at: decoder.2, method: test_mean, keep: 60, made: 4}",
        "{at: decoder.2, method: test_mean, keep: 20, made: 2}",
    ),
    "joint-synthetic": ("{at: decoder.2, method: test_mean, keep: 30, made: 2, scope: joint}",),
    "joint-fused": ("{at: decoder.0, method: test_fuse, keep: 40, scope: joint}",),
}
QUICK = ("none-left", "synthetic", "truncated", "joint-fused")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EFFECTS]


@pytest.fixture(scope="module", autouse=True)
def methods() -> Iterator[None]:
    with sequence_methods():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


_BUILT: dict[str, Built] = {}


def built(folder: Path, name: str) -> Built:
    if name not in _BUILT:
        _BUILT[name] = build(folder, name, MODEL, EFFECTS[name], {"images": 2, "text_tokens": 64})
    return _BUILT[name]


@pytest.mark.parametrize("name", EVERY)
def test_the_bundle_is_the_reference(name: str, folder: Path) -> None:
    proof, cases = prove(built(folder, name), conversations(), steps=6)
    assert not proof.failures, "\n".join(proof.failures[:5])
    assert proof.steps == 2 * sum(len(t.expected.tokens) for c in cases for t in c.turns), "nothing was left out"
    assert proof.free == proof.free_turns and not proof.exceptions
    assert proof.distinct > 3


def test_one_picture_prefilled_whole_and_in_chunks(folder: Path) -> None:
    one = build(folder, "one-fused", MODEL, ("{at: decoder.0, method: test_fuse, keep: 40}",))
    proof, _ = prove(one, pairs(4), steps=4, routes=("whole", "chunked"))
    assert not proof.failures and proof.steps == 32


def test_every_subgraph_by_itself(folder: Path) -> None:
    for name in ("synthetic", "none-left"):
        ladder = climb(built(folder, name).folder, MODEL, steps=2)
        assert ladder.passed, ladder.text()


# ------------------------------------------------------------------------------------------------------ what it looks like
def test_synthetic_tokens_stand_behind_the_kept_ones_of_their_picture(folder: Path) -> None:
    from tmc_export.verify.reference import Reference

    subject = built(folder, "synthetic")
    reference = Reference(subject.model, subject.plan, trace=True)
    (case,) = [c for c in conversations() if c.name == "two-pictures-apart"]
    from tmc_export.verify.record import answer

    turn = answer(reference, case, subject.plan, 1).turns[0].expected
    before, after = turn.blocks
    assert [s.kept[-3:].tolist() for s in turn.stages] == [[-1] * 3] * 2 and (turn.stages[0].kept[:30] >= 0).all()
    for picture in (1, 2):
        own, arrived = after.order[after.group == picture], before.order[before.group == picture]
        assert len(own) == 33 and own[-3:].tolist() == arrived[-3:].tolist()
        assert (after.positions[0][after.group == picture][-3:] == before.positions[0][before.group == picture][-1]).all()
    assert (np.diff(after.order) > 0).all()


def test_the_answer_reports_synthetic_tokens(folder: Path) -> None:
    session = built(folder, "synthetic").load()
    from tests.end_to_end._tiny import EXAMPLES

    answer = session.turn([EXAMPLES / "pictures" / "scene-1.png"], "what is at c4", max_new_tokens=1)
    first, second = answer.kept["1.0"]
    assert first[-3:] == (-1, -1, -1) and len(first) == 33 and second == ()
    assert answer.visual_tokens == (196, 33)


def test_nothing_left_at_all_is_refused_and_the_conversation_stays(folder: Path) -> None:
    session = built(folder, "none-left").load()
    (case,) = [c for c in conversations() if c.name == "one-of-two"]
    (pixels, ids) = case.turns[0]
    prompt = session.prompt([i for i in ids if i == session.program.image_token], [(b, p[None]) for b, p in pixels])
    with pytest.raises(RuntimeInputError, match="nothing is left of the prompt behind the cut at layer 2"):
        session.run_prompt(prompt)
    assert session.decoder.length == 0 and [s.used for s in session.decoder.slots] == [0, 0]


def test_truncated_positions_of_a_later_turn_begin_where_the_first_layers_stand(folder: Path) -> None:
    """After a turn of n tokens, k of them behind the cut, the next one begins at n under truncate, at k under renumber."""
    from tests.end_to_end._proof import lay_out, unanswered

    (case,) = [c for c in conversations() if c.name == "second-turn"]
    found: dict[str, list[tuple[int, int]]] = {}
    for name in ("truncated", "synthetic-renumbered"):
        session = built(folder, name).load()
        for turn in range(2):
            pixels, ids = case.turns[turn]
            given = replace(unanswered(case), pixels=tuple(p for _, p in pixels), buckets=tuple(b for b, _ in pixels), ids=ids)
            session.run_prompt(lay_out(session, given))
            found.setdefault(name, []).append((session.decoder.slots[0].next_position, session.decoder.slots[1].next_position))
    text = len(case.turns[0][1]) - 1
    assert found["truncated"][0] == (196 + text, 40 + text) and found["synthetic-renumbered"][0] == (196 + text, 33 + text)
    more = len(case.turns[1][1])
    assert found["truncated"][1] == (196 + text + more,) * 2, "the gap of the dropped tokens stays"
    assert found["synthetic-renumbered"][1] == (196 + text + more, 33 + text + more), "no gap"


# ------------------------------------------------------------------------------------------------------ mistakes are found
def failures(built: Built, cases: Any) -> list[str]:
    return [c.name for c in play(built.load(), cases, TABLE, "float32") if not c.passed]


_LEAVE = _sequence.leave


def test_another_place_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last synthetic token behind the text that follows the picture, which then does not see it."""
    subject = built(folder, "synthetic")

    def behind(tokens: Any, rows: Any, listed: Any, values: Any) -> Any:
        found = _LEAVE(tokens, rows, listed, values)
        return replace(found, order=torch.cat([found.order[:-1], found.order[-1:] + 2]) if listed[-1] < 0 else found.order)

    monkeypatch.setattr(_decode, "leave", behind)
    names = failures(subject, reference_cases(subject, pairs(2), 3))
    assert any(n.endswith("/logits") for n in names)


def test_another_position_of_a_synthetic_token_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = built(folder, "synthetic")

    def first(tokens: Any, rows: Any, listed: Any, values: Any) -> Any:
        found = _LEAVE(tokens, rows, listed, values)
        made = torch.tensor([s < 0 for s in listed])
        return replace(found, positions=torch.where(made, tokens.positions[:, :, rows[:1]], found.positions))

    monkeypatch.setattr(_decode, "leave", first)
    names = failures(subject, reference_cases(subject, pairs(2), 3))
    assert any(n.endswith("/logits") for n in names)


def test_renumbered_for_truncated_is_found_in_a_later_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a first turn the two are the same; behind it they are not."""
    subject = built(folder, "truncated")
    cases = [c for c in reference_cases(subject, conversations(), 3) if c.name in ("one-of-two", "second-turn")]
    program = subject.load().program
    other = program.model_copy(update={"cuts": tuple(c.model_copy(update={"positions": "renumber"}) for c in program.cuts)})
    session = subject.load()
    session.program, session.decoder = other, Decoder(other, session._backend)
    names = [c.name for c in play(session, cases, TABLE, "float32") if not c.passed]
    assert names == ["second-turn/turn 2/logits"]


def test_another_text_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests._sequence_methods import Fuse

    subject = built(folder, "joint-fused")
    fuse = Fuse.apply

    def unfused(stage: Any, tokens: Any, context: Any, config: Any) -> Any:
        return replace(fuse(stage, tokens, context, config), text=context.text)

    monkeypatch.setattr(Fuse, "apply", staticmethod(unfused))
    names = failures(subject, reference_cases(subject, pairs(1), 2))
    assert "pair-00/turn 1/logits" in names


def test_a_synthetic_token_too_few_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = built(folder, "synthetic")
    mean = Mean.apply

    def fewer(stage: Any, tokens: Any, context: Any, config: Any) -> Any:
        out = mean(stage, tokens, context, config)
        return replace(out, valid=out.valid & (torch.arange(out.valid.shape[1]) < out.valid.shape[1] - 1))

    monkeypatch.setattr(Mean, "apply", staticmethod(fewer))
    names = failures(subject, reference_cases(subject, pairs(1), 2))
    assert "pair-00/turn 1/test_mean at decoder.2" in names
