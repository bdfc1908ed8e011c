"""What the reference reports of a turn, as plain numpy data.

Legend: T tokens of the turn, v visual tokens of a picture, n candidates, k kept, c channels, r rotary axes, g KV heads, d their channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BlockTrace", "ReferenceTurn", "StageTrace"]


@dataclass(frozen=True)
class StageTrace:
    """What one stage did to one picture (or to all of them).

    Attributes:
        entry: index of the entry in the recipe's `compress` list.
        method: registered name.
        at: the site, as recipes write it.
        index: which of the entry's stages.
        picture: number of the picture within the turn, from 1; 0 when the stage saw all of them at once.
        candidates: n.
        kept: `[k]` place of every token that left among the candidates that reached this cut (encoder sites: this stage); -1 = synthetic.
        source: `[k]` original index among the uncompressed tokens of the picture; -1 = synthetic.
        scores: `[n]` what the method ranked by, in the order that `kept` counts in; None unless it asked for one row of attention or for
            column sums.
        margin: (lowest kept - highest dropped score) / largest score, when the kept set is the top of `scores`; else None.
        fragile: a relative noise of the tolerance table's bound on what the method read changes what it keeps or merges.
        states: what it handed on, `[1, …]` each; not stored in files.
    """

    entry: int
    method: str
    at: str
    index: int
    picture: int
    candidates: int
    kept: NDArray[np.int64]
    source: NDArray[np.int64]
    scores: NDArray[np.float32] | None
    margin: float | None
    fragile: bool
    states: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def tied(self, bound: float) -> bool:
        """Return whether the choice is within rounding: the k-th margin is at most `bound`, or, without a margin, noise changes it."""
        return self.fragile if self.margin is None else self.margin <= bound

    def excuses_source(self, got: NDArray[np.int64], bound: float) -> bool:
        """As `excuses`, for places as in `source`; after an earlier stage those say nothing about the scores."""
        return self.excuses(got, bound) if np.array_equal(self.source, self.kept) else self.tied(bound)

    def excuses(self, got: NDArray[np.int64], bound: float) -> bool:
        """Return whether `got` may stand for `kept`: a tie, in which only tokens scored within `bound` of the threshold are exchanged.

        Args:
            got: `[k]`, places as in `kept`.
            bound: relative to the largest score.
        """
        if np.array_equal(got, self.kept):
            return True
        if not self.tied(bound):
            return False
        if self.scores is None or self.margin is None or not self.kept.size:
            return True
        exchanged = np.setxor1d(got, self.kept)
        if exchanged.size and (exchanged.min() < 0 or exchanged.max() >= self.scores.shape[0]):
            return False
        threshold, largest = self.scores[self.kept].min(), np.abs(self.scores).max()
        return bool((np.abs(self.scores[exchanged] - threshold) <= bound * largest).all())


@dataclass(frozen=True)
class BlockTrace:
    """The tokens of a turn's prompt at one block of the plan.

    Attributes:
        first, last: layers `[first, last)`.
        hidden_in, hidden_out: `[T, c]` before the first and after the last layer.
        positions: `[r, T]` rotary positions.
        order: `[T]` places in the conversation, which the masks are made of.
        group: `[T]` 0 text, else the picture's number within the turn.
        keys, values: layer → `[g, T, d]`, as the layer put them into its cache.
        queries: layer → `[h, T, d]`, rotated and scaled; of the layers that the cut after this block scores with.
    """

    first: int
    last: int
    hidden_in: NDArray[np.float32]
    hidden_out: NDArray[np.float32]
    positions: NDArray[np.int64]
    order: NDArray[np.int64]
    group: NDArray[np.int64]
    keys: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    values: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    queries: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReferenceTurn:
    """One turn of a conversation.

    Attributes:
        tokens: what was answered: greedy, or the forced tokens. The last one was not fed: a later turn's `input_ids` begin with it.
        logits: `[steps, vocabulary]` float32; row i is what token i was chosen from.
        vision: per picture `[v, c]`, what leaves the projector and the stages there.
        stages: in the order they ran, encoder sites of all pictures first.
        blocks: the prompt at every block of the plan; empty unless the reference was made with `trace=True`.
        cache_rows: per decoder layer, KV rows after the turn.
        positions: `[r, T]` rotary positions of the prompt; None once read back from a file.
        texts: text tower → what it made of the turn's question, `[width]`; empty without pictures, and once read back.
    """

    tokens: tuple[int, ...]
    logits: NDArray[np.float32]
    vision: tuple[NDArray[np.float32], ...]
    stages: tuple[StageTrace, ...]
    blocks: tuple[BlockTrace, ...]
    cache_rows: tuple[int, ...]
    positions: NDArray[np.int64] | None = None
    texts: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def greedy(self) -> tuple[int, ...]:
        """The most likely token at every step; equal to `tokens` unless those were forced."""
        return tuple(int(i) for i in self.logits.argmax(-1))

    def kept(self, at: str) -> list[NDArray[Any]]:
        """Return the `kept` of all stages at a site, in the order they ran."""
        return [s.kept for s in self.stages if s.at == at]
