"""Calling a method's `apply` in the reference, one picture at a time, and asking whether its choice hangs on rounding.

Legend: n candidates, k kept, c channels, h heads, s keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Attention, Compressed, Context, Need
from tmc_export.plan.types import StagePlan
from tmc_export.verify._trace import StageTrace

__all__ = ["Applied", "apply_stage", "from_weights"]

_DRAWS = 4


@dataclass(frozen=True)
class Applied:
    """A stage's result, and what is to be reported of it (places still those of the stage)."""

    result: Compressed
    trace: StageTrace


def from_weights(weights: Tensor, need: Attention, place: str) -> Tensor:
    """Reduce eager attention weights `[1, h, rows, s]` to what a need asks for: `[1, s]`, or `[1, h, s]` with `heads="none"`.

    Raises:
        ExportError: the need is not served here.
    """
    if need.logits or need.rows not in ("last", "cls", "all"):
        raise ExportError(f"the reference does not capture {need} at {place}; rows of last, cls and all, after softmax, are")
    rows = {"last": weights[:, :, -1:], "cls": weights[:, :, :1]}.get(need.rows, weights).float()
    if need.heads == "none":
        return rows.sum(2)
    joined = rows.amax(1) if need.heads == "max" else rows.sum(1) if need.heads == "sum" else rows.mean(1)
    return joined.sum(1)  # heads are joined before rows are summed: the largest head is another one in every row


def apply_stage(plan: StagePlan, tokens: Tensor, context: Context, picture: int, noise: float) -> Applied:
    """Run a stage on `tokens [1, n, c]` and check it against its layout.

    Args:
        plan: the stage.
        tokens: the candidates.
        context: what the method may read.
        picture: number within the turn, 0 for all.
        noise: relative size of the rounding that the choice is tried against.

    Raises:
        ExportError: other counts than planned, or a result the reference does not carry.
    """
    method = METHODS.get(plan.method)
    where = f"method '{plan.method}' at {plan.stage.at}"
    if tokens.shape[1] != plan.before.tokens:
        raise ExportError(f"{where}: the plan says {plan.before.tokens} candidates, {tokens.shape[1]} arrive; plan and input disagree")
    result = method.apply(plan.stage, tokens, context, plan.config)
    if tuple(result.tokens.shape[:2]) != (1, plan.after.tokens) or tuple(result.source.shape) != (1, plan.after.tokens):
        raise ExportError(f"{where} returned tokens {list(result.tokens.shape)}, its layout says {plan.after.tokens}; mend one of them")
    if result.text is not None:
        if not method.replaces_text or context.text is None:
            raise ExportError(f"{where} returned text tokens; only a method with replaces_text that asks for TextEmbeds may")
        if result.text.shape != context.text.shape:
            raise ExportError(f"{where} returned text {list(result.text.shape)}, it was given {list(context.text.shape)}; return as many")
    scores = _scores(context.captured)
    kept = result.source[0]
    trace = StageTrace(
        entry=plan.entry,
        method=plan.method,
        at=str(plan.stage.at),
        index=plan.stage.index,
        picture=picture,
        candidates=int(tokens.shape[1]),
        kept=kept.numpy().astype(np.int64),
        source=torch.where(kept >= 0, context.source[0][kept.clamp(min=0)], -1).numpy().astype(np.int64),
        scores=None if scores is None else scores.numpy().astype(np.float32),
        margin=None if scores is None else _margin(scores, kept, context.valid[0]),
        fragile=_fragile(plan, tokens, context, result, noise),
        states={name: value.numpy().copy() for name, value in result.state.items()},
    )
    return Applied(result, trace)


def _scores(captured: Mapping[Need, Tensor]) -> Tensor | None:
    found = [c for n, c in captured.items() if isinstance(n, Attention) and c.dim() == 2]
    return found[0][0].float() if len(found) == 1 else None


def _margin(scores: Tensor, kept: Tensor, valid: Tensor) -> float | None:
    """Return the relative gap between the lowest kept and the highest dropped score; None when the kept set is not a top set."""
    inside = torch.zeros(scores.shape[0], dtype=torch.bool)
    inside[kept[kept >= 0]] = True
    inside, outside = inside & valid, ~inside & valid
    if not inside.any():
        return None
    if not outside.any():
        return float("inf")
    gap = float(scores[inside].min() - scores[outside].max())
    return None if gap < 0 else gap / max(float(scores[valid].abs().max()), 1e-30)


def _fragile(plan: StagePlan, tokens: Tensor, context: Context, result: Compressed, noise: float) -> bool:
    """Try the method on inputs a relative `noise` away; the draws are seeded."""
    if noise <= 0:
        return False
    method = METHODS.get(plan.method)
    draw = torch.Generator().manual_seed(0)

    def shaken(value: Tensor) -> Tensor:
        return (value.float() * (1 + noise * torch.randn(value.shape, generator=draw))).to(value.dtype)

    for _ in range(_DRAWS):
        near = replace(context, captured={n: shaken(c) for n, c in context.captured.items()})
        other = method.apply(plan.stage, shaken(tokens), near, plan.config)
        if not torch.equal(other.source, result.source):
            return True
        if result.assign is not None and other.assign is not None and not torch.equal(other.assign, result.assign):
            return True
    return False
