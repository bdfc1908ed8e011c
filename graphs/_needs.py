"""What a stage may ask the framework to capture for it: a closed set of kinds.

Legend: b batch, n candidates, m text tokens, c channels, h heads, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Attention", "Features", "Keys", "Need", "TextEmbeds", "TextTower"]


@dataclass(frozen=True)
class Need:
    """Something a stage asks the framework to capture for it; the set of kinds is closed."""


@dataclass(frozen=True)
class Attention(Need):
    """Attention weights of one layer, over the candidates.

    Captured as `[b, n]` for `rows` of `last` and `cls`; `heads="none"` puts the head axis after the batch: `[b, h, n]`. For `rows="text"`
    and `"window"`: `[b, rows, n]` (`[b, h, rows, n]` with `heads="none"`). The text rows are those of `Context.text` and
    `text_valid`; rows of padding are zero. A turn shorter than the window has its rows at the end, zeros before. For `rows="all"`, and
    wherever `row_sum` is set: the column sums `[b, n]` (`[b, h, n]` with `heads="none"`); padded rows count nothing.
    The weights are softmax over **every** visible key (past, text and visual), in float32; the columns of the candidates are then taken.
    A pair that the causal mask hides is 0, also with `logits`. Rows are those of the tokens that arrive at the cut, also for its second
    stage. Heads are joined before rows are summed. Sums over many rows are made in blocks of rows, so that the map is never kept, and one
    pass serves all sums over `all`, `visual` and `text` rows of a layer.

    Attributes:
        layer: `previous` (the layer before the cut) or `next` (the layer after it, its query and keys computed from the tokens at the cut).
        rows: which query rows: the last valid token, the class token, the text tokens of this turn, the visual tokens of this turn
            (`visual`, always with `row_sum`), the last `window` tokens, or all.
        heads: how the heads are joined: mean, max, sum or none; `joined` is one head over the whole width, scaled by its root (encoders
            only).
        window: rows in the window when `rows` is `window`.
        row_sum: hand the sum over rows instead of the rows.
        logits: hand the scaled products before softmax.
    """

    layer: Literal["previous", "next"] = "previous"
    rows: Literal["last", "text", "cls", "visual", "window", "all"] = "last"
    heads: Literal["mean", "max", "sum", "none", "joined"] = "mean"
    window: int = 0
    row_sum: bool = False
    logits: bool = False


@dataclass(frozen=True)
class Features(Need):
    """Hidden states `[b, n, c]` after encoder layer `layer` (0-based; -1 is the last in use)."""

    layer: int = -1


@dataclass(frozen=True)
class Keys(Need):
    """Attention keys `[b, n, h, d]`, unscaled and before any rotary embedding.

    Attributes:
        layer: `previous`, of the layer before the site (at `.mid`: of that layer), or `next`, of the layer after it, computed from the
            tokens at the cut.
    """

    layer: Literal["previous", "next"] = "previous"


@dataclass(frozen=True)
class TextEmbeds(Need):
    """The turn's text tokens `[b, m, c]`, in `Context.text`: their embeddings at `decoder.0`, their hidden states at a later cut."""


@dataclass(frozen=True)
class TextTower(Need):
    """What a text encoder of its own makes of the question: its projected embedding `[b, width]`, not normalised.

    The question is the text of the message that brought the picture, without image placeholders and chat template. The encoder is a
    subgraph of the bundle with a tokenizer of its own, and runs once a turn. At any site but `input`, with `scope: image`.

    Attributes:
        source: hub id or folder (relative to the recipe) of a CLIP checkpoint; SigLIP's are not built.
        width: channels of the embedding.
    """

    source: str
    width: int
