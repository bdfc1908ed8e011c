"""Conversations as a user holds them, against the reference on Hugging Face's own prompts; and a turn border, which changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.end_to_end._proof import Built, build, near_ties  # noqa: E402
from tests.end_to_end._tiny import COMPRESS, EXAMPLES, MODEL  # noqa: E402
from tmc_export.core.image_rule import ImageRule  # noqa: E402
from tmc_export.runtime._chat import expand_image_tokens  # noqa: E402
from tmc_export.runtime._images import load_image, prepare  # noqa: E402
from tmc_export.verify.reference import Reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

STEPS = 12
ONE, TWO = (str(EXAMPLES / "pictures" / f"scene-{n}.png") for n in (1, 2))
Ask = tuple[tuple[str, ...], str]

CONVERSATIONS: dict[str, tuple[Ask, ...]] = {
    "a second question": (((ONE,), "what is at c4"), ((), "what colour is c4")),
    "a second picture": (((ONE,), "what is at c4"), ((TWO,), "what colour is d3")),
    "text before a picture": (((), "how many digits"), ((TWO,), "what is at b4")),
    "two pictures and a question more": (((ONE, TWO), "is there a green circle"), ((), "how many squares")),
}


@pytest.fixture(scope="module")
def fastv(tmp_path_factory: pytest.TempPathFactory) -> Built:
    inputs = {"images": 2, "text_tokens": 64, "new_tokens": 48}
    return build(tmp_path_factory.mktemp("conversation"), "fastv-conversation", MODEL, COMPRESS["fastv"], inputs)


def template_ids(asks: Sequence[Ask], answers: Sequence[Sequence[int]]) -> list[int]:
    """Ids of the next turn: the conversation so far, written by Hugging Face, less what has been fed; its answers are `answers`."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    messages: list[dict[str, Any]] = []
    fed: list[int] = []
    for number in range(len(answers) + 1):
        pictures, text = asks[number]
        messages.append({"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]})
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = list(tokenizer(written, add_special_tokens=False).input_ids)
        assert ids[: len(fed)] == fed, "the conversation begins with what was fed"
        if number < len(answers):
            fed = [*ids, *answers[number][:-1]]
            said = tokenizer.decode(answers[number], skip_special_tokens=True).strip()
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    return ids[len(fed) :]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_session_turns_are_the_reference_on_hugging_face_prompts(fastv: Built, name: str) -> None:
    asks, session, reference = CONVERSATIONS[name], fastv.load(), Reference(MODEL, fastv.plan)
    rule = ImageRule.from_json(dict(session.program.vision[0].rule))
    answers: list[tuple[int, ...]] = []
    for pictures, text in asks:
        ids = template_ids(asks, answers)
        pixels = [prepare(load_image(p), rule) for p in pictures]
        expanded, group = expand_image_tokens(ids, session.program.image_token, reference.visual_tokens(pixels))
        want = reference.turn(pixels, expanded, group.astype(np.int64), max_new_tokens=STEPS)
        got = session.turn(pictures, text, max_new_tokens=STEPS)
        assert not near_ties(want.logits).size, "choose another question: rounding may choose here"
        assert got.tokens == want.tokens
        assert got.prompt_tokens == len(expanded)
        assert [list(k) for k in got.kept.get("1.0", ()) if k] == [s.kept.tolist() for s in want.stages]
        answers.append(got.tokens)
    assert answers[0][-1] in session.program.eos and len(set(answers)) == len(answers)


@pytest.mark.parametrize(("picture", "text"), [(ONE, "what is at c4"), (TWO, "what colour is d3"), (TWO, "is there a green square")])
def test_a_turn_border_in_front_of_the_picture_changes_nothing(fastv: Built, picture: str, text: str) -> None:
    """The same tokens in one turn and in two: the left context lies in the slots then, and the selection must see it there."""
    session = fastv.load()
    ids = template_ids([((picture,), f"{text} {text}")], [])
    at = ids.index(session.program.image_token)
    question, ids = ids[at + 1 :], [*ids[:at], *ids[at + 1 : -1], *ids[at:]]  # words in front of the picture as well
    at = ids.index(session.program.image_token)
    assert at > 8 and question
    pixels = session.encode_images([picture])
    whole = session.run_prompt(session.prompt(ids, pixels), "whole")
    step = session.decoder.step(9)
    session.reset()
    session.run_prompt(session.prompt(ids[:at], ()))
    parted = session.run_prompt(session.prompt(ids[at:], pixels))
    np.testing.assert_array_equal(parted.kept[(1, 0)], whole.kept[(1, 0)])
    np.testing.assert_allclose(parted.logits, whole.logits, rtol=0, atol=1e-4 * np.abs(whole.logits).max())
    np.testing.assert_allclose(session.decoder.step(9), step, rtol=0, atol=1e-4 * np.abs(step).max())
    session.reset()
    alone = session.run_prompt(session.prompt(ids[at:], pixels))
    assert np.abs(alone.logits - whole.logits).max() > 1e-2, "the context in front matters, or nothing was tested"
