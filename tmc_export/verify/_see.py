"""The reference's way from one picture's pixels to its visual tokens: encoder, projector, and the stages in between.

Legend: n tokens, c channels, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Attention, Context, Features, Keys, Need
from tmc_export.plan.types import StagePlan, VisionPlan
from tmc_export.verify._ahead import from_products, keys_ahead
from tmc_export.verify._apply import apply_stage, from_weights
from tmc_export.verify._learned import MethodWeights
from tmc_export.verify._towers import Tower
from tmc_export.verify._trace import StageTrace

__all__ = ["Seen", "see"]


@dataclass
class Seen:
    """What stands of a picture while it is encoded, and at the end.

    Attributes:
        tokens: `[1, n, c]`.
        source: `[1, n]` original index among the picture's uncompressed tokens at this place.
        valid: `[1, n]`.
        key_bias: `[1, n]`, added to the attention logits of these keys.
        weights, keys, features: of the layer that ran last; features of all layers.
        entered: that layer's number, what entered it, `[1, n, c]`, and the key bias it ran with.
        states: entry → what its last stage left for the next.
        texts: what text towers made of the question that the picture came with, `[1, width]`.
        traces: the stages that ran.
    """

    tokens: Tensor
    source: Tensor
    valid: Tensor
    key_bias: Tensor | None = None
    weights: Tensor | None = None
    keys: Tensor | None = None
    entered: tuple[int, Tensor, Tensor | None] | None = None
    features: list[Tensor] = field(default_factory=list)
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    traces: list[StageTrace] = field(default_factory=list)
    texts: Mapping[Need, Tensor] = field(default_factory=dict)


def see(
    tower: Tower, plan: VisionPlan, pixels: Tensor, picture: int, noise: float, weights: MethodWeights, texts: Mapping[Need, Tensor]
) -> Seen:
    """Encode a prepared picture `[1, …]` and run every stage up to the projector's.

    Args:
        tower: encoder and projector.
        plan: the picture's bucket.
        pixels: prepared by the runtime's own image rule.
        picture: number within the turn.
        noise: see `apply_stage`.
        weights: what the methods have learned.
        texts: what text towers made of the question.
    """

    def run(part: str, layer: int | None = None, point: str | None = None) -> None:
        for stage in plan.stages:
            at = stage.stage.at
            if (at.part, at.layer, at.point) == (part, layer, point):
                _run(stage, plan, tower, seen, picture, noise, weights)

    seen = _fresh(tower.raster(pixels, plan).flatten(2).transpose(1, 2))
    run("input")
    if seen.traces:
        rows, columns = _raster(plan)
        pixels = seen.tokens.transpose(1, 2).reshape(1, -1, rows, columns)
    seen = replace(_fresh(tower.embed(pixels, plan)), traces=seen.traces, texts=texts)
    for layer in range(tower.layers):
        run("encoder", layer)
        seen.entered = (layer, seen.tokens, seen.key_bias)
        seen.tokens, seen.weights, seen.keys = tower.attend(layer, seen.tokens, seen.key_bias)
        run("encoder", layer, "mid")
        seen.tokens = tower.feed_forward(layer, seen.tokens)
        seen.features.append(seen.tokens)
    run("encoder")
    classes = _class_tokens(plan)
    seen.tokens, seen.source, seen.valid = seen.tokens[:, classes:], seen.source[:, classes:], seen.valid[:, classes:]
    merge = plan.facts.encoder.merge
    if plan.replacing is not None:
        _without_classes(seen, classes)
        if merge > 1:
            seen = replace(_fresh(tower.in_raster(seen.tokens)), traces=seen.traces, states=seen.states, texts=seen.texts)
            patch = seen.source[0]
            seen.source = (patch // plan.grid[1] // merge * (plan.grid[1] // merge) + patch % plan.grid[1] // merge)[None]
        run("projector", point="replace")
    else:
        seen.tokens = tower.project(seen.tokens)
        if merge > 1:
            seen = replace(_fresh(seen.tokens), traces=seen.traces, states=seen.states, texts=seen.texts)
    run("projector")
    return seen


def _fresh(tokens: Tensor) -> Seen:
    count = tokens.shape[1]
    return Seen(tokens, torch.arange(count)[None], torch.ones(1, count, dtype=torch.bool))


def _raster(plan: VisionPlan) -> tuple[int, int]:
    grid = [s.after.grid for s in plan.stages if s.stage.at.part == "input"][-1]
    if grid is None:
        raise ExportError("a stage at input left no raster of pixels; no encoder takes that")
    return grid


def _class_tokens(plan: VisionPlan) -> int:
    """Class tokens that still stand before the projector."""
    inside = [s for s in plan.stages if s.stage.at.part == "encoder"]
    return inside[-1].after.class_tokens if inside else plan.facts.encoder.class_tokens


def _without_classes(seen: Seen, classes: int) -> None:
    """Take the class tokens out of what a stage behind them may ask for."""
    if seen.weights is not None:
        seen.weights = seen.weights[..., classes:]
    if seen.keys is not None:
        seen.keys = seen.keys[:, classes:]
    seen.features = [f[:, classes:] for f in seen.features]


def _run(stage: StagePlan, plan: VisionPlan, tower: Tower, seen: Seen, picture: int, noise: float, weights: MethodWeights) -> None:
    """Apply one stage and move along what is the framework's."""
    context = Context(
        layout=stage.before,
        facts=plan.facts,
        valid=seen.valid,
        source=seen.source,
        captured={n: _capture(n, tower, seen, stage) for n in stage.stage.needs},
        state=seen.states.get(stage.entry, {}),
        weights=weights.of(stage),
    )
    applied = apply_stage(stage, seen.tokens, context, picture, noise)
    result = applied.result
    seen.states[stage.entry] = dict(result.state)
    if result.key_bias is not None:
        seen.key_bias = result.key_bias
    elif seen.key_bias is not None:
        seen.key_bias = seen.key_bias[:, result.source[0].clamp(min=0)]
    seen.source = torch.from_numpy(applied.trace.source)[None]
    seen.tokens, seen.valid = result.tokens, result.valid
    seen.traces.append(applied.trace)


def _capture(need: Need, tower: Tower, seen: Seen, stage: StagePlan) -> Tensor:
    """Take what a stage asks for out of the layer that ran last, or of the one to come.

    Raises:
        ExportError: nothing ran before this place, a stage cut in between, or the need is not served in an encoder.
    """
    place = str(stage.stage.at)
    if need in seen.texts:
        return seen.texts[need]
    if isinstance(need, Features) and seen.features:
        return seen.features[need.layer]
    if isinstance(need, (Attention, Keys)) and need.layer == "next":
        layer = tower.layers if stage.stage.at.layer is None else stage.stage.at.layer
        if isinstance(need, Keys):
            return keys_ahead(tower, layer, seen.tokens, need)
        return from_products(tower, layer, seen.tokens, seen.key_bias, need, place)
    found = seen.keys if isinstance(need, Keys) else seen.weights
    if found is None or found.shape[-1 if isinstance(need, Attention) else 1] != seen.tokens.shape[1]:
        raise ExportError(f"the reference has nothing to give for {need} at {place}: no layer ran since the last cut")
    if isinstance(need, Keys):
        return found
    if isinstance(need, Attention) and (need.logits or need.heads == "joined") and seen.entered is not None:
        return from_products(tower, *seen.entered, need, place)
    if isinstance(need, Attention):
        return from_weights(found, need, place)
    raise ExportError(f"the reference does not capture {need} at {place}")
