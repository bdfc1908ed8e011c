"""A bundle's tokenizer: text to ids as Hugging Face's would, and ids back to text, token by token for streaming."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from tmc_export.core.errors import BundleError, RuntimeInputError

__all__ = ["TextStream", "Tokenizer", "read_json"]

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """`tokenizer.json` with the special tokens that the files beside it name.

    Args:
        folder: holds `tokenizer.json`, and as a rule `tokenizer_config.json` (old checkpoints also `special_tokens_map.json`).

    Attributes:
        special_tokens: the named ones, e.g. `{"bos_token": "<s>", ...}`; chat templates may use them.

    Raises:
        BundleError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BundleError(f"{path} does not exist; a slow tokenizer must be saved as tokenizer.json before the bundle is built")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  the library raises bare Exception for any fault of the file
            raise BundleError(f"{path} cannot be read as a tokenizer ({error}); build the bundle again") from error
        # What a file asks for training batches: a prompt is neither cut nor padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        named = config if "added_tokens_decoder" in config else {**config, **read_json(folder / "special_tokens_map.json")}
        texts = {key: _token_text(named.get(key)) for key in _NAMED}
        self.special_tokens = {key: text for key, text in texts.items() if text is not None}
        self._tokenizer.add_special_tokens(list(dict.fromkeys([*self.special_tokens.values(), *_more_special(named)])))
        self._special_ids = frozenset(index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    @property
    def eos_id(self) -> int | None:
        """Id of the end token, where the files name one. `generation_config.json` may name more."""
        return self.token_id(self.special_tokens["eos_token"]) if "eos_token" in self.special_tokens else None

    def token_id(self, token: str) -> int | None:
        """Id of one whole token, or None."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Text to ids.

        Args:
            text: may hold special tokens such as image placeholders; they become their ids.
            add_special_tokens: whether the tokenizer puts its own around the text. None: unless the text begins with the beginning
                token, as rendered chat templates do.

        Returns:
            The ids.

        Raises:
            RuntimeInputError: the text holds a lone surrogate, which has no bytes.
        """
        if add_special_tokens is None:
            bos = self.special_tokens.get("bos_token")
            add_special_tokens = not (bos and text.startswith(bos))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RuntimeInputError(
                f"the prompt has no valid character at position {error.start}; give text that is valid UTF-8"
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids to text, all at once. Ids beyond the vocabulary (a padded embedding table has some) give no text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is left out of the text."""
        return token_id in self._special_ids

    def stream(self) -> TextStream:
        """A new answer, to be decoded token by token."""
        return TextStream(self)


class TextStream:
    """Text of an answer while its tokens arrive: the pieces put together are `decode` of all ids, special tokens left out.

    A piece never ends inside a character: bytes that wait for their rest are held back. The work per token does not grow with the answer.
    Where the ids hold broken UTF-8, a byte-fallback decoder gives up on the whole run of bytes; a stream keeps what it has shown.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The tokens of the last piece, whose text is out (they stay, because a decoder treats a first token differently); then those
        # held back.
        self._window: list[int] = []
        self._done = 0

    def push(self, token_id: int) -> str:
        """Take one token; return the text that became complete, often none."""
        if self._tokenizer.is_special(token_id):
            return ""
        self._window.append(token_id)
        piece = self._new_text()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._window = self._window[self._done :]
        self._done = len(self._window)
        return piece

    def finish(self) -> str:
        """The end of the answer: what was held back, broken characters as U+FFFD."""
        piece = self._new_text()
        self._window, self._done = [], 0
        return piece

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._window[: self._done])
        whole = self._tokenizer.decode(self._window)
        return whole[len(known) :] if whole.startswith(known) else self._tokenizer.decode(self._window[self._done :])


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file; empty where there is no file.

    Raises:
        BundleError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}); build the bundle again") from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds {type(data).__name__}; it must be a JSON object")
    return data


def _token_text(value: object) -> str | None:
    """A token written as text or as `{"content": text, ...}`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _more_special(config: Mapping[str, object]) -> list[str]:
    """Special tokens beyond the named ones, in any of the spellings."""
    found: list[object] = []
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(key)
        found += list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return [text for text in map(_token_text, found) if text is not None]
