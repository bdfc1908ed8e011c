"""Conversations with a bundle of tiny-llava: what is fed, what is streamed, and what a failed turn leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmc_export.core.errors import BundleError, RuntimeInputError
from tmc_export.runtime._backend import options_for
from tmc_export.runtime._sampling import Sampler
from tmc_export.runtime.session import Answer, Session, load

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE = f"""\
recipe: 1
name: session
model: {{source: {EXAMPLES / "tiny-llava"}, dtype: float32}}
inputs: {{images: 2, text_tokens: 96, new_tokens: 24, chunk: 16}}
compress:
  - {{at: decoder.2, method: fastv, keep: 25%}}
target: {{device: cpu, runtime: onnxruntime}}
"""
PICTURES = [EXAMPLES / "pictures" / f"scene-{n}.png" for n in (1, 2)]
QUESTION = "what is at c4"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Session:
    import tmc_export

    folder = tmp_path_factory.mktemp("session")
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
    tmc_export.build(folder / "recipe.yaml", folder / "bundle", record=False)
    return load(folder / "bundle", threads=1)


@pytest.fixture
def session(opened: Session) -> Session:
    opened.program = opened.manifest.program
    opened.reset()
    return opened


def _recomputing(session: Session) -> Session:
    session.program = session.program.model_copy(update={"turns": "recompute"})
    return session


def _fed(session: Session) -> str:
    """The conversation as the decoder has it, an answer's last token included."""
    said = session._conversation.said
    return session.tokenizer.decode([*said.fed, *said.unfed], skip_special_tokens=False)


def test_one_picture_of_two_and_two(session: Session) -> None:
    one = session.generate(PICTURES[:1], QUESTION)
    two = session.generate(PICTURES, QUESTION)
    assert one.visual_tokens == (196, 49) and two.visual_tokens == (392, 98), "of the pictures that were given"
    assert [len(p) for p in one.kept["1.0"]] == [49, 0] and [len(p) for p in two.kept["1.0"]] == [49, 49]
    assert one.kept["1.0"][0] == tuple(sorted(one.kept["1.0"][0])) and max(two.kept["1.0"][1]) < 196
    assert session.generate((), QUESTION).visual_tokens == ()


def test_where_memory_is_tight_the_answers_are_the_same(session: Session) -> None:
    program = session.program.model_copy(update={"memory_tight": True})
    tight = Session(session.folder, session.manifest.model_copy(update={"program": program}), "onnxruntime", options_for(program, 1))
    for images, question in ((PICTURES[:1], QUESTION), ((), "what is at b2"), (PICTURES[1:], QUESTION)):
        mine, theirs = tight.turn(images, question), session.turn(images, question)
        assert (mine.tokens, mine.kept, mine.visual_tokens) == (theirs.tokens, theirs.kept, theirs.visual_tokens)


def test_the_same_question_gives_the_same_answer_whatever_was_asked_before(session: Session) -> None:
    first = session.generate(PICTURES[:1], QUESTION)
    session.turn(PICTURES[1:], "what is at b2")
    again = session.generate(PICTURES[:1], QUESTION)
    assert (again.text, again.tokens, again.kept) == (first.text, first.tokens, first.kept)


@pytest.mark.parametrize("limit", [None, 1], ids=["ended by itself", "cut off"])
def test_chat_turns_feed_the_rendered_conversation_once(session: Session, limit: int | None) -> None:
    """Turn by turn the decoder gets what the template renders, each token once, the cut-off answer's last one included."""
    assert session.template is not None
    first = session.turn(PICTURES[:1], QUESTION, max_new_tokens=limit)
    session.turn((), "what is at b2", max_new_tokens=2)
    rendered = session._conversation.said.prompt
    joined = "".join(session._conversation.said.prompt.split())
    assert "".join(_fed(session).split()).startswith(joined) and first.text.strip() in rendered
    fed = session._conversation.said.fed
    whole = session.tokenizer.encode(rendered)
    assert list(fed[: len(whole)]) == whole


def test_a_later_turn_equals_the_conversation_computed_anew(session: Session) -> None:
    """Without a selection before it, a turn on kept slots and a recomputed one answer alike."""
    answers: list[list[Answer]] = []
    for recompute in (False, True):
        session.reset()
        if recompute:
            _recomputing(session)
        answers.append([session.turn((), "what digit is at d3"), session.turn(PICTURES[:1], QUESTION)])
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]
    assert answers[1][1].prompt_tokens > answers[0][1].prompt_tokens, "the twin has computed everything again"


def test_plain_turns_go_on_from_the_last_token(session: Session) -> None:
    first = session.turn((), "USER: hello ASSISTANT:", chat=False, max_new_tokens=3)
    session.turn((), " USER: and ASSISTANT:", chat=False, max_new_tokens=2)
    ids = [*session.tokenizer.encode("USER: hello ASSISTANT:"), *first.tokens]
    ids += session.tokenizer.encode(" USER: and ASSISTANT:", add_special_tokens=False)
    assert list(session._conversation.said.fed[: len(ids)]) == ids
    assert session.decoder.length == len(session._conversation.said.fed)


def test_a_chat_turn_cannot_follow_a_plain_one(session: Session) -> None:
    session.turn((), "hello", chat=False, max_new_tokens=2)
    with pytest.raises(RuntimeInputError, match="plain prompt"):
        session.turn((), "hello")


def test_the_stream_is_the_text_in_order(session: Session) -> None:
    pieces: list[str] = []
    answer = session.generate(PICTURES[:1], QUESTION, on_text=pieces.append)
    assert len(pieces) > 1 and all(pieces) and "".join(pieces) == answer.text and answer.finish == "eos"
    assert answer.tokens[-1] in session.program.eos
    word = answer.text.split()[-1]
    pieces.clear()
    stopped = session.generate(PICTURES[:1], QUESTION, stop=[word], on_text=pieces.append)
    assert stopped.finish == "stop" and "".join(pieces) == stopped.text == answer.text[: answer.text.index(word)]
    assert session.generate(PICTURES[:1], QUESTION, stop=["zebra"]).text == answer.text


def test_limits_and_timings(session: Session) -> None:
    answer = session.generate(PICTURES[:1], QUESTION, max_new_tokens=1)
    assert (answer.finish, len(answer.tokens), answer.timings.token_ms) == ("length", 1, 0.0)
    assert 0 < answer.timings.vision_ms < answer.timings.first_token_ms


def test_a_full_context_ends_the_answer_and_refuses_the_next_turn(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "pick", lambda *_: 10)  # never an end token
    answer = session.turn((), "what digit is at d3", max_new_tokens=1000)
    assert answer.finish == "context" and session.decoder.room() == 0
    before = session._conversation.said
    with pytest.raises(RuntimeInputError, match="the context is full"):
        session.turn((), "and")
    assert session._conversation.said == before
    assert session.generate((), "what digit is at d3", max_new_tokens=3).finish == "length"


class _Broken(Exception):
    pass


def _raises(_: str) -> None:
    raise _Broken


@pytest.mark.parametrize("recompute", [False, True], ids=["freeze", "recompute"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_any_failure_leaves_the_conversation_as_it_was(
    session: Session, chat: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recompute:
        _recomputing(session)

    def talk(disturbed: bool) -> list[tuple[int, ...]]:
        session.reset()
        found = [session.turn(PICTURES[:1], QUESTION, chat=chat, max_new_tokens=4).tokens]
        if disturbed:
            with pytest.raises(_Broken):  # a callback's own error, in the middle of an answer
                session.turn((), "what is at c3", chat=chat, on_text=_raises)
            with pytest.raises(RuntimeInputError, match="pictures given"):
                session.turn(PICTURES * 2, "what is at c3", chat=chat)
            with pytest.raises(RuntimeInputError, match="stop string"):
                session.turn((), "what is at c3", chat=chat, stop=[""])
            with monkeypatch.context() as patched, pytest.raises(BundleError, match="NaN"):
                patched.setattr(type(session.decoder), "step", lambda *_, **__: _not_a_number())
                session.turn((), "what is at c3", chat=chat)
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(Sampler, "pick", _interrupt)
                session.turn((), "what is at c3", chat=chat)
        return [*found, session.turn((), "what is at b2", chat=chat, max_new_tokens=4).tokens]

    assert talk(disturbed=True) == talk(disturbed=False)


def _not_a_number() -> object:
    import numpy as np

    return np.full(3, np.nan)


def _interrupt(*_: object) -> int:
    raise KeyboardInterrupt
