"""Running a method's stage: hand it what it asked for, check what it returns, and move along what belongs to the framework.

Legend: b batch, n candidates, k tokens that leave, h heads, R query rows, s keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Attention, Compressed, Context, Need, TextTower
from tmc_export.plan.types import StagePlan, TowerPlan
from tmc_export.surgery.replay import choose

__all__ = ["attention_scores", "gather_rows", "join_heads", "move_source", "run_stage", "text_inputs", "texts_by_need"]


def gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Take rows along axis 1; negative indices take row 0: `[b, n, …]`, `[b, k]` → `[b, k, …]`."""
    index = index.clamp(min=0)
    if tensor.dim() == 2:
        return tensor.gather(1, index)
    flat = tensor.flatten(2)
    return flat.gather(1, index[:, :, None].expand(-1, -1, flat.shape[2])).reshape(index.shape[0], index.shape[1], *tensor.shape[2:])


def join_heads(weights: Tensor, need: Attention) -> Tensor:
    """Join the head axis (1) as the need says: `[b, h, …]` → `[b, …]`, unchanged for `none`."""
    if need.heads == "mean":
        return weights.mean(1)
    if need.heads == "max":
        return weights.amax(1)
    if need.heads == "joined":
        return weights.squeeze(1)
    return weights.sum(1) if need.heads == "sum" else weights


def attention_scores(query: Tensor, key: Tensor, mask: Tensor | None, need: Attention, row_valid: Tensor | None = None) -> Tensor:
    """Attention of some query rows over all keys, in float32, joined as a need says.

    Args:
        query: `[b, h, R, d]`, scaled by `d ** -0.5`.
        key: `[b, h, s, d]`, already expanded to the query heads.
        mask: additive, broadcastable to `[b, 1, R, s]`.
        need: which rows and heads.
        row_valid: `[b, R]` bool; padded rows count nothing in a sum over rows.

    Returns:
        `[b, s]` for one row or a sum over rows, `[b, R, s]` for several; a head axis after the batch with `heads="none"`.
    """
    logits = query.float() @ key.float().transpose(-1, -2)
    if need.heads == "joined":  # the products of all heads added up are those of one head h times as wide
        logits = logits.sum(1, keepdim=True) * query.shape[1] ** -0.5
    if mask is not None:
        logits = logits + mask.float()
    weights = logits if need.logits else logits.softmax(-1)
    if need.rows == "all" or need.row_sum:
        if row_valid is not None:
            weights = torch.where(row_valid[:, None, :, None], weights, 0.0)
        return join_heads(weights, need).sum(-2)
    weights = join_heads(weights, need)
    return weights.squeeze(-2) if need.rows in ("last", "cls") else weights


def run_stage(plan: StagePlan, tokens: Tensor, context: Context) -> Compressed:
    """Run one stage and check its result against the planned layout.

    Raises:
        ExportError: the method returns other counts than its layout promises.
    """
    method = METHODS.get(plan.method)
    result = choose(plan, tokens, lambda: method.apply(plan.stage, tokens, context, plan.config))
    batch, wanted = tokens.shape[0], plan.after.tokens
    shapes: Mapping[str, tuple[Any, Any]] = {
        "tokens": (tuple(result.tokens.shape), (batch, wanted, plan.after.width)),
        "source": (tuple(result.source.shape), (batch, wanted)),
        "valid": (tuple(result.valid.shape), (batch, wanted)),
    }
    for name, (got, planned) in shapes.items():
        if got != planned:
            raise ExportError(
                f"method '{plan.method}' at {plan.stage.at} returned {name} {list(got)}, "
                f"its layout says {list(planned)}; mend its layout or apply"
            )
    if result.text is not None and (not method.replaces_text or context.text is None or result.text.shape != context.text.shape):
        given = None if context.text is None else list(context.text.shape)
        raise ExportError(
            f"method '{plan.method}' at {plan.stage.at} returned text {list(result.text.shape)}, it was given {given}; a method that "
            "returns text sets replaces_text, asks for TextEmbeds and returns as many tokens"
        )
    return result


def move_source(before: Tensor, result: Compressed) -> Tensor:
    """Compose original indices: candidates' `[b, n]` through a stage → `[b, k]`; -1 stays synthetic."""
    return torch.where(result.source >= 0, gather_rows(before, result.source), -1)


def text_inputs(towers: Mapping[TextTower, TowerPlan]) -> list[str]:
    """Names of the inputs that bring what text towers made of the question, one per tower."""
    return list(dict.fromkeys(f"text.{t.index}" for t in towers.values()))


def texts_by_need(towers: Mapping[TextTower, TowerPlan], texts: Sequence[Tensor]) -> dict[Need, Tensor]:
    """Give every need the input of its tower; `texts` are in the order of `text_inputs`."""
    named = dict(zip(text_inputs(towers), texts, strict=True))
    return {need: named[f"text.{tower.index}"] for need, tower in towers.items()}


def captured_or_raise(captured: Mapping[Need, Tensor], needs: tuple[Need, ...], place: str) -> dict[Need, Tensor]:
    """Pick the needs of a stage out of what was captured.

    Raises:
        ExportError: a need was not captured at this place.
    """
    missing = [n for n in needs if n not in captured]
    if missing:
        raise ExportError(f"nothing captures {missing} at {place}")
    return {n: captured[n] for n in needs}
