"""Text towers on the device: a question to the tower's own ids, and through its graph.

What a tower reads is the question as the user wrote it: the text of the message that brought the pictures, without image placeholders
and without the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import TowerProgram
from tmc_export.core.errors import RuntimeInputError
from tmc_export.runtime._backend import Backend
from tmc_export.runtime._tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["TextTowers", "question_of", "tower_ids"]


def question_of(prompt: str, image_text: str) -> str:
    """Return a prompt without image placeholders and the blanks around it.

    >>> question_of("<image>\\nWhat is this?", "<image>")
    'What is this?'
    """
    return prompt.replace(image_text, " ").strip()


def tower_ids(tokenizer: Tokenizer, text: str, tokens: int) -> list[int]:
    """Encode a question with the tower's own special tokens; a longer one loses its end (not its end token), a shorter one is padded.

    Padded with the tokenizer's padding token; its id has no say, because a tower attends causally and is read at the first end token.
    """
    ids = tokenizer.encode(text, add_special_tokens=True)
    if len(ids) > tokens:
        ids = [*ids[: tokens - 1], ids[-1]]
    pad = tokenizer.token_id(tokenizer.special_tokens.get("pad_token", ""))
    return ids + [ids[-1] if pad is None else pad] * (tokens - len(ids))


class TextTowers:
    """The text towers of a bundle.

    Args:
        towers: from its program.
        folder: the bundle.
        backend: runs the graphs.

    Raises:
        BundleError: a tokenizer is missing or damaged.
    """

    def __init__(self, towers: Sequence[TowerProgram], folder: Path, backend: Backend) -> None:
        self._towers = towers
        self._tokenizers = [Tokenizer(folder / t.folder) for t in towers]
        self._graphs = [backend.graph(t.file) for t in towers]

    def embed(self, texts: Sequence[str], pictures: int) -> list[Mapping[str, Array]]:
        """Run every tower once for each different text: per picture, `text.<n>` → `[1, width]`.

        Args:
            texts: per picture, the question that it came with.
            pictures: how many there are.

        Raises:
            RuntimeInputError: a picture has no question, or a question is not valid text.
        """
        if not self._towers:
            return [{} for _ in range(pictures)]
        if len(texts) != pictures:
            raise RuntimeInputError(
                f"{pictures} pictures came with {len(texts)} questions; this bundle reads a picture by its question: give one for each"
            )
        made = {text: self._run(text) for text in dict.fromkeys(texts)}
        return [made[text] for text in texts]

    def ids(self, index: int, text: str) -> Array:
        """The ids that a tower gets for a question: int64 `[1, tokens]`."""
        return np.array([tower_ids(self._tokenizers[index], text, self._towers[index].tokens)], np.int64)

    def _run(self, text: str) -> Mapping[str, Array]:
        pairs = enumerate(self._graphs)
        return {f"text.{n}": graph.run({"ids": self.ids(n, text)})["embedding"] for n, graph in pairs}
