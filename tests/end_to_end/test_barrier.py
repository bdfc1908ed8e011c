"""Tokens behind a picture that hide it from the text, on the shipped small LLaVA: bundle = reference, and what is hidden is hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests._sequence_methods import sequence_methods  # noqa: E402
from tests.end_to_end._proof import TABLE, Built, build, lay_out, prove, reference_cases, unanswered  # noqa: E402
from tests.end_to_end._tiny import MODEL, conversations, pairs  # noqa: E402
from tmc_export.graphs.voco import phases, visible  # noqa: E402
from tmc_export.runtime._barrier import since_of  # noqa: E402
from tmc_export.verify.ladder import climb  # noqa: E402
from tmc_export.verify.play import play  # noqa: E402
from tmc_export.verify.record import Script  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with sequence_methods():
        entry = ("{at: projector, method: test_barrier, made: 3}",)
        yield build(tmp_path_factory.mktemp("barrier"), "barrier", MODEL, entry, {"images": 1, "text_tokens": 64})


def scripts() -> list[Script]:
    """One picture at most in a turn: a second turn without and with a picture, no picture at all."""
    return [s for s in conversations() if all(len(pictures) < 2 for pictures, _ in s.turns) and s.name != "second-picture"] + pairs(2)


def test_the_bundle_is_the_reference(built: Built) -> None:
    proof, cases = prove(built, scripts(), steps=6)
    assert not proof.failures, "\n".join(proof.failures[:5])
    assert proof.steps == 2 * sum(len(t.expected.tokens) for c in cases for t in c.turns)
    assert proof.free == proof.free_turns and not proof.exceptions


def test_every_subgraph_by_itself(built: Built) -> None:
    ladder = climb(built.folder, MODEL, steps=2)
    assert ladder.passed, ladder.text()


def test_the_picture_leaves_every_layer_and_changes_nothing_behind_the_barrier(built: Built) -> None:
    (case,) = [s for s in scripts() if s.name == "one-of-two"]
    session = built.load()
    prompt = lay_out(session, unanswered(case))
    session.run_prompt(prompt)
    text_behind = len(prompt.group) - int(np.flatnonzero(prompt.group)[-1]) - 1
    assert [s.used for s in session.decoder.slots] == [3 + text_behind], "the rows of the barrier and of what follows"
    assert int(session.decoder.slots[0].order[0, 0]) == session.decoder.since == int(np.flatnonzero(prompt.group)[-3])


def test_the_rule_is_the_official_mask() -> None:
    """`voco.visible` is proved by the goldens; the first place a token sees says the same for one picture."""
    group = np.array([0, 0, 1, 1, 1, 1, 1, 0, 0, 0])
    since, following = since_of(group, np.arange(10), 2, 0)
    phase = phases(torch.tensor([[5 <= i < 7 for i in range(10)]]))[0]
    phase = torch.where(torch.tensor([[5 <= i < 7 for i in range(10)]])[0], torch.ones_like(phase), phase)
    causal = torch.arange(10)[:, None] >= torch.arange(10)[None]
    official = visible(phase[:, None], phase[None]) & causal
    ours = torch.from_numpy(np.arange(10)[None] >= since[:, None]) & causal
    assert torch.equal(ours, official) and following == 5


def test_text_that_sees_the_picture_is_found(built: Built) -> None:
    """The twin: a reference without the barrier answers something else."""
    plain = replace(built, plan=replace(built.plan, vision=tuple(replace(v, barrier=0) for v in built.plan.vision)))
    cases = reference_cases(plain, pairs(1), 2)
    failed = {c.name for c in play(built.load(), cases, TABLE, "float32") if not c.passed}
    assert failed == {"pair-00/turn 1/logits", "pair-00/turn 1/KV rows"}


def test_an_interrupted_turn_is_undone(built: Built) -> None:
    (case,) = [s for s in scripts() if s.name == "text-then-picture"]
    session = built.load()
    first, second = (
        replace(unanswered(case), pixels=tuple(p for _, p in t[0]), buckets=tuple(b for b, _ in t[0]), ids=t[1]) for t in case.turns
    )
    session.run_prompt(lay_out(session, first))
    mark = session.decoder.mark()
    wanted = session.run_prompt(lay_out(session, second)).logits
    session.decoder.rewind(mark)
    assert session.decoder.since == 0
    assert np.array_equal(session.run_prompt(lay_out(session, second)).logits, wanted)
