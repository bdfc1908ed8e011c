"""Floating-point operations of every part: a multiply-add is two. Static graphs compute whole squares, so causal halves are not taken off.

Norms, activations and softmax are left out (below 1 %). Of a selector the score side path and the comparisons of the reassembly are
counted; matching and merging of candidates by keys as one product of what arrives with what leaves. What a method does beyond that
(TokenCarve's decomposition) is not. Learned weights count as matrices, every one multiplied with every token that arrives (or leaves,
where those are more): an estimate, too high for queries that are fewer than the tokens.

Legend: T new tokens, s keys that they see, n tokens in the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from tmc_export.core.facts import DecoderFacts, ModelFacts
from tmc_export.graphs._contract import Attention, Keys
from tmc_export.plan._weights import looks_ahead, projector_widths
from tmc_export.plan.rows import rows_computed
from tmc_export.plan.types import CutPlan, Plan, StagePlan, TowerPlan, VisionPlan

__all__ = [
    "CutFlops",
    "LayerTokens",
    "VisionTokens",
    "cut_flops",
    "decoder_layer_flops",
    "encoder_flops",
    "head_flops",
    "learned_flops",
    "projection_flops",
    "projector_flops",
    "tower_flops",
    "vision_stage_flops",
    "vision_tokens",
]


@dataclass(frozen=True)
class LayerTokens:
    """Tokens in the two halves of one encoder layer; they differ when a stage cuts between them."""

    attention: int
    feed_forward: int


@dataclass(frozen=True)
class VisionTokens:
    """How many tokens of one picture go through what.

    Attributes:
        layers: through each encoder layer.
        projected: into the projector, class tokens dropped and patches not yet joined.
    """

    layers: tuple[LayerTokens, ...]
    projected: int


def vision_tokens(vision: VisionPlan) -> VisionTokens:
    """Follow the tokens of one picture from layer to layer."""
    encoder = vision.facts.encoder
    count, classes = encoder.tokens, encoder.class_tokens
    stages = [s for s in vision.stages if s.stage.at.part == "encoder"]
    layers: list[LayerTokens] = []

    def after(layer: int | None, point: str | None) -> int:
        here = [s for s in stages if (s.stage.at.layer, s.stage.at.point) == (layer, point)]
        return here[-1].after.tokens if here else count

    for layer in range(encoder.layers):
        count = attention = after(layer, None)
        count = after(layer, "mid")
        layers.append(LayerTokens(attention, count))
    count = after(None, None)
    if stages:
        classes = stages[-1].after.class_tokens
    return VisionTokens(tuple(layers), count - classes)


def encoder_flops(facts: ModelFacts, tokens: tuple[LayerTokens, ...]) -> int:
    """Patch embedding and layers: 8nc² + 4n²c in the attention half, 4ncm in the other."""
    e = facts.encoder
    patches = 2 * e.grid[0] * e.grid[1] * 3 * e.patch * e.patch * e.width
    return patches + sum(
        8 * t.attention * e.width**2 + 4 * t.attention**2 * e.width + 4 * t.feed_forward * e.width * e.intermediate for t in tokens
    )


def projector_flops(facts: ModelFacts, projected: int) -> int:
    """The two linears, over joined patches."""
    into, inner, out = projector_widths(facts)
    return 2 * (projected // facts.encoder.merge**2) * (into * inner + inner * out)


def tower_flops(tower: TowerPlan) -> int:
    """A text tower on one question, padded to its context: 8Lc² + 4L²c + 4Lcm a layer, and the projection of one row."""
    n, c = tower.tokens, tower.hidden
    return tower.layers * (8 * n * c**2 + 4 * n**2 * c + 4 * n * c * tower.intermediate) + 2 * c * tower.width


def learned_flops(stage: StagePlan) -> int:
    """An estimate of what learned weights cost for one picture: 2 · tokens · numbers in matrices, counted with the entry's first stage."""
    if stage.weights is None or stage.stage.index:
        return 0
    return 2 * max(stage.before.tokens, stage.after.tokens) * stage.weights.matrix_elements


def projection_flops(vision: VisionPlan, projected: int) -> int:
    """The family's projector, or the method that replaces it."""
    return projector_flops(vision.facts, projected) if vision.replacing is None else learned_flops(vision.replacing)


def decoder_layer_flops(d: DecoderFacts, new: int, keys: int) -> int:
    """One layer for T new tokens over s keys: projections, scores and values, and a gated feed-forward part of three linears.

    With as many KV heads as heads and s = T this is 2(4Tc² + 2T²c + 3Tcm): FastV's formula with the third linear of a gated part.
    """
    query, key = d.heads * d.head_dim, d.kv_heads * d.head_dim
    projections = 2 * new * d.width * (2 * query + 2 * key)
    return projections + 4 * new * keys * query + 6 * new * d.width * d.intermediate


def head_flops(d: DecoderFacts) -> int:
    """The output head on one row: only the last token's logits are computed."""
    return 2 * d.width * d.vocabulary


@dataclass(frozen=True)
class CutFlops:
    """What one cut costs.

    Attributes:
        previous, following: query rows and keys of the layer before the cut and of the one after it that the side path multiplies.
        scores: that side path: rows · keys · heads · head_dim · 2.
        summed: query rows and keys of the map that the block before adds up itself.
        adding: what that takes.
        duplicated: query and key projections of the next layer, computed once more.
        selection: comparisons, matching and merging, and learned weights.
    """

    previous: tuple[int, int]
    following: tuple[int, int]
    scores: int
    duplicated: int
    selection: int
    summed: tuple[int, int] = (0, 0)
    adding: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.scores + self.duplicated + self.selection + self.adding


def cut_flops(plan: Plan, cut: CutPlan) -> CutFlops:
    """Reckon one decoder cut for a full bucket."""
    d, query = plan.facts.decoder, plan.facts.decoder.heads * plan.facts.decoder.head_dim
    previous, following = cut.scored("previous"), cut.attention("next")
    past = plan.blocks[cut.before_block - 1].capacity if previous else 0
    ahead = plan.blocks[cut.before_block].capacity + cut.tokens_in if following else 0
    text = cut.tokens_in - cut.visual_in
    rows, more = rows_computed(previous, cut.tokens_in, text), rows_computed(following, cut.tokens_in, text)
    duplicated = 2 * cut.tokens_in * d.width * (query + d.kv_heads * d.head_dim) if following else 0
    joining = cut.tokens_in * cut.tokens_out + cut.tokens_out * cut.visual_out
    each = [(selection_flops(s, d.head_dim) + learned_flops(s)) * (plan.images if s.scope == "image" else 1) for s in cut.stages]
    summed = (cut.tokens_in, cut.tokens_in) if cut.summed else (0, 0)
    adding = sum(summed[0] * summed[1] * ((d.heads + 2) if n.heads == "max" else 2 * d.heads) for n in cut.summed)
    scores = 2 * (rows * past + more * ahead) * query
    return CutFlops((rows, past), (more, ahead), scores, duplicated, joining + sum(each), summed, adding)


def vision_stage_flops(vision: VisionPlan) -> int:
    """Score side paths and selectors inside the vision graph."""
    width, heads = vision.facts.encoder.width, vision.facts.encoder.heads
    total = 0
    for stage in vision.stages:
        if stage.stage.at.part == "input":
            continue
        n = stage.before.tokens
        total += sum(2 * _rows(need, n) * n * width for need in stage.stage.needs if isinstance(need, Attention))
        total += 4 * n * width**2 if looks_ahead(stage) else 0
        total += selection_flops(stage, width // heads)
        total += learned_flops(stage) if stage is not vision.replacing else 0
    return total


def selection_flops(stage: StagePlan, head_dim: int) -> int:
    """Comparisons of what arrives with what leaves, and with keys the matching and merging products."""
    n, k = stage.before.tokens, stage.after.tokens
    merging = 2 * n * k * (head_dim + stage.after.width) if any(isinstance(need, Keys) for need in stage.stage.needs) else 0
    return n * k + merging


def _rows(need: Attention, count: int) -> int:
    return {"last": 1, "cls": 1, "window": need.window}.get(need.rows, count)
