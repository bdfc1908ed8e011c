"""From logits to the next token, and when to stop: greedy or random choice, end tokens, stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tmc_export.core.errors import BundleError, RuntimeInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Sampler", "Sampling", "StopStrings", "eos_ids", "probabilities"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token (ties: the lowest id); above 0 draws at random from softmax(logits / temperature).
        top_k: draw among the k likeliest only; 0 for all.
        top_p: then draw among the likeliest that together reach this probability; 1 for all.
        seed: of the draw; the same seed gives the same answer. None: another one each time.

    Raises:
        RuntimeInputError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RuntimeInputError(f"temperature is {self.temperature}; give 0 (no randomness) or more")
        if self.top_k < 0:
            raise RuntimeInputError(f"top-k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise RuntimeInputError(f"top-p is {self.top_p}; give more than 0 and at most 1 (all tokens)")
        if self.seed is not None and self.seed < 0:
            raise RuntimeInputError(f"seed is {self.seed}; give 0 or more")


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: how.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: NDArray[np.floating]) -> int:
        """The next token.

        Args:
            logits: `[vocabulary]` of the last position.

        Returns:
            Its id.

        Raises:
            BundleError: the logits hold NaN, or no token is possible.
        """
        likeliest = int(np.argmax(logits)) if logits.size else 0  # of a NaN, if there is one
        if not np.isfinite(logits[likeliest : likeliest + 1]).any():
            raise BundleError(
                "the logits hold NaN or infinity, as after an overflow in half precision; run `tmc-export verify` on this bundle"
            )
        if self.sampling.temperature == 0:
            return likeliest
        cumulated = np.cumsum(probabilities(logits, self.sampling))
        # The draw is at most 1 - 2**-53, so the product lies below the sum also after rounding; and the first id whose sum exceeds it has a
        # share of its own, so never probability 0.
        return int(np.searchsorted(cumulated, self._random.random() * cumulated[-1], side="right"))


def probabilities(logits: NDArray[np.floating], sampling: Sampling) -> NDArray[np.float64]:
    """What is drawn from: temperature, then top-k, then top-p, normalised.

    Args:
        logits: `[vocabulary]`.
        sampling: its temperature is above 0.

    Returns:
        float64 `[vocabulary]`, zero where a token cannot be drawn. Of top-k exactly k tokens remain, ties at the border to the lowest
        ids; of top-p at least one.
    """
    scores = logits.astype(np.float64)
    scores = (scores - scores.max()) / sampling.temperature
    order = np.argsort(-scores, kind="stable")
    kept = order[: sampling.top_k] if sampling.top_k else order
    weights = np.exp(scores[kept])
    weights /= weights.sum()
    if sampling.top_p < 1:
        # A token stays while those before it do not reach top_p yet.
        stays = np.cumsum(weights) - weights < sampling.top_p
        stays[0] = True
        kept, weights = kept[stays], weights[stays]
    out = np.zeros(scores.shape[0], dtype=np.float64)
    out[kept] = weights / weights.sum()
    return out


def eos_ids(*configs: Mapping[str, object]) -> frozenset[int]:
    """The end tokens named by the first configuration that names any.

    Args:
        configs: e.g. `generation_config.json`, then `config.json`, then its `text_config`; `eos_token_id` is a number, a list or null.

    Raises:
        BundleError: `eos_token_id` is something else.
    """
    for config in configs:
        value = config.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, (list, tuple)) else [value]
        whole = [index for index in ids if isinstance(index, int) and not isinstance(index, bool)]
        if len(whole) != len(ids):
            raise BundleError(f"eos_token_id is {value!r}; it must be a token id or a list of them")
        return frozenset(whole)
    return frozenset()


class StopStrings:
    """Ends an answer where one of some strings appears, also across token borders; that string and what follows is cut off.

    Text that may be the beginning of a stop string is held back until it is decided.

    Args:
        strings: none of them empty.

    Attributes:
        stopped: the string that ended the answer, or None.

    Raises:
        RuntimeInputError: an empty string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise RuntimeInputError("a stop string is empty; give at least one character")
        self._strings = tuple(strings)
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """Take a piece of the answer; return what can be shown. Nothing comes after the stop."""
        if self.stopped is not None:
            return ""
        self._held += text
        hits = [(self._held.find(string), -len(string), string) for string in self._strings if string in self._held]
        if hits:
            begin, _, self.stopped = min(hits)
            shown, self._held = self._held[:begin], ""
            return shown
        # The longest end of the text that some stop string begins with.
        longest = min(len(self._held), max((len(string) - 1 for string in self._strings), default=0))
        ends = (length for length in range(longest, 0, -1) if any(string.startswith(self._held[-length:]) for string in self._strings))
        keep = next(ends, 0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The end of the answer without a stop: what was held back."""
        shown, self._held = self._held, ""
        return shown
