"""What was said in a conversation: messages for the chat template, ids for the decoder.

A state is never changed: a turn makes the next one and puts it in place when it has succeeded, so that a turn that fails was never said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tmc_export.core.errors import RuntimeInputError
from tmc_export.runtime._chat import ChatTemplate, place_images
from tmc_export.runtime._text_tower import question_of
from tmc_export.runtime._tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = tuple[tuple[int, NDArray[Any]], ...]

__all__ = ["Conversation", "Said"]


@dataclass(frozen=True)
class Said:
    """A conversation up to some point.

    Attributes:
        messages: for the template; empty in a plain conversation.
        prompt: the conversation as it was rendered for the last question.
        answer: text of the last answer.
        unfed: the answer's last token, which the decoder has not taken yet, where the next turn does not bring it itself.
        fed: ids that the decoder has taken, one per picture.
        pixels: every picture so far, with its bucket.
        questions: per picture, the user's text that it came with.
    """

    messages: tuple[dict[str, object], ...] = ()
    prompt: str = ""
    answer: str = ""
    unfed: tuple[int, ...] = ()
    fed: tuple[int, ...] = ()
    pixels: Pixels = ()
    questions: tuple[str, ...] = ()


class Conversation:
    """Turns questions into ids, one turn after the other.

    Args:
        tokenizer: the bundle's.
        template: its chat template, if it has one.
        image_text: what a prompt writes for one picture.
        eos: ids that end an answer.

    Attributes:
        said: the state.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, image_text: str, eos: Sequence[int]) -> None:
        self._tokenizer, self._template, self._image_text, self._eos = tokenizer, template, image_text, frozenset(eos)
        self.said = Said()

    def ask(self, prompt: str, pixels: Pixels, chat: bool) -> tuple[list[int], Said]:
        """Encode the next turn.

        Args:
            prompt: what the user says.
            pixels: the turn's pictures.
            chat: with the chat template, where there is one.

        Returns:
            The turn's ids, one image token per picture, and the state after the question; `answer` makes it the conversation's.

        Raises:
            RuntimeInputError: a chat turn in a plain conversation, or a template that rewrites earlier turns.
        """
        template = self._template if chat else None
        ids, asked = self._plain(prompt, len(pixels)) if template is None else self._chat(template, prompt, len(pixels))
        said, question = self.said, question_of(prompt, self._image_text)
        questions = (*said.questions, *[question for _ in pixels])
        return ids, replace(asked, fed=(*said.fed, *ids), pixels=(*said.pixels, *pixels), questions=questions)

    def answer(self, asked: Said, text: str, tokens: Sequence[int]) -> None:
        """Put the answer behind the question. The tokens of a stop text have been fed, and stay."""
        messages, last = asked.messages, tuple(tokens[-1:])
        if messages and self._template is not None:
            messages = (*messages, self._template.message("assistant", text))
            last = tuple(t for t in last if t not in self._eos)  # the template writes the end itself
        self.said = replace(asked, messages=messages, answer=text, unfed=last, fed=(*asked.fed, *tokens[:-1]))

    def reset(self) -> None:
        """Start a new conversation."""
        self.said = Said()

    def _chat(self, template: ChatTemplate, prompt: str, pictures: int) -> tuple[list[int], Said]:
        """A later turn gets only what the decoder has not seen yet."""
        if self.said.fed and not self.said.messages:
            raise RuntimeInputError("this conversation has a plain prompt, which no chat template can go on from; start a new conversation")
        messages = (*self.said.messages, template.message("user", prompt, pictures, self._image_text))
        text = template.render(messages, add_generation_prompt=True)
        if self.said.messages:
            ids = [*self.said.unfed, *self._tokenizer.encode(text[self._known(text) :], add_special_tokens=False)]
        else:
            ids = self._tokenizer.encode(text)
        return ids, Said(messages, text)

    def _known(self, text: str) -> int:
        """Length of the part of a rendered conversation that the decoder holds already: the last prompt, and the answer after blanks."""
        before, answer = self.said.prompt, self.said.answer.strip()
        found = text.find(answer, len(before))
        if not text.startswith(before) or found < 0 or text[len(before) : found].strip():
            raise RuntimeInputError("this chat template rewrites earlier turns, so that they cannot be kept; start a new conversation")
        return found + len(answer)

    def _plain(self, prompt: str, pictures: int) -> tuple[list[int], Said]:
        """The prompt as it is, behind the last token of the answer; without placeholders, one per picture is put in front."""
        first = not self.said.fed
        text = place_images(prompt, pictures, self._image_text)
        ids = self._tokenizer.encode(text, add_special_tokens=None if first else False)
        if not ids:
            raise RuntimeInputError("the prompt is empty; write a question")
        return [*self.said.unfed, *ids], Said()
