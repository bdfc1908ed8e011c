"""Which projections feed a score, and whether they are rounded: the score's own arithmetic never is."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from tmc_export.api.simulation import Simulation
from tmc_export.graphs._contract import Attention, Features, Keys, Need, TextEmbeds, TextTower
from tmc_export.plan.types import Plan, StagePlan

__all__ = ["ScoreInput", "score_inputs"]


@dataclass(frozen=True)
class ScoreInput:
    """What a stage scores with.

    Attributes:
        stage: `fastv at decoder.2`.
        reads: where the score comes from: `query and key of decoder layer 1`.
        state: how these are computed: `follow their layer (int8)`, `pinned by keep`, `base precision`, …
    """

    stage: str
    reads: str
    state: str


def score_inputs(plan: Plan, simulation: Simulation) -> list[ScoreInput]:
    """List what the stages of a plan score with, in order; every bucket's vision stages once."""
    found: list[ScoreInput] = []
    for stage, layer, place in _stages(plan):
        name = f"{stage.method} at {stage.stage.at}"
        if not stage.stage.needs:
            found.append(ScoreInput(name, "the tokens that arrive", "nothing of its own is projected"))
        found += [ScoreInput(name, *_source(need, place, layer, plan, simulation)) for need in stage.stage.needs]
    return list(dict.fromkeys(found))


def _stages(plan: Plan) -> Iterator[tuple[StagePlan, int, str]]:
    """Stage, layer that ran last before it, and where it is."""
    for vision in plan.vision:
        for stage in vision.stages:
            at, layers = stage.stage.at, vision.facts.encoder.layers
            before = layers - 1 if at.layer is None else at.layer if at.point == "mid" else at.layer - 1
            yield stage, before, "encoder"
    for cut in plan.cuts:
        for stage in cut.stages:
            yield stage, cut.layer - 1, "decoder"


def _source(need: Need, place: str, before: int, plan: Plan, simulation: Simulation) -> tuple[str, str]:
    if isinstance(need, TextTower):
        return f"the text tower {need.source}", "base precision: text towers are never quantized"
    if isinstance(need, TextEmbeds):
        return "the text tokens that arrive", "nothing of its own is projected"
    if isinstance(need, Features):
        return f"features of encoder layer {need.layer if need.layer >= 0 else before}", "follow the layers up to there"
    if not isinstance(need, (Attention, Keys)):
        return str(need), "not known"
    what = "keys" if isinstance(need, Keys) else "query and key"
    layer = before + 1 if need.layer == "next" else before
    reads = f"{what} of {place} layer {layer}"
    if place == "decoder" and need.layer == "next":
        return reads, "base precision: the compress graph projects them itself"
    return reads, _state(place, layer, isinstance(need, Keys), plan, simulation)


def _state(place: str, layer: int, keys: bool, plan: Plan, simulation: Simulation) -> str:
    scheme = plan.quantize.get(place)
    if scheme is None:
        return "base precision: the recipe does not quantize that part"
    if scheme.stored is not None:
        return f"follow the checkpoint's own codes ({scheme.weights})"
    words = ("k_proj", "qkv") if keys else ("q_proj", "k_proj", "qkv")
    rounded = _projections(simulation.targets, simulation, place, layer, words)
    wanted = 1 if keys or any(word == "qkv" for word in rounded) else 2
    if not rounded:
        return "pinned by keep: base precision"
    codes = scheme.weights if scheme.activations is None else f"{scheme.weights} weights, {scheme.activations} inputs"
    return (
        f"follow their layer ({codes})"
        if len(rounded) == wanted
        else f"{' and '.join(rounded)} follow their layer ({codes}), the rest is kept"
    )


def _projections(names: Collection[str], simulation: Simulation, place: str, layer: int, words: tuple[str, ...]) -> list[str]:
    found = []
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        numbered = any(a in ("layers", "blocks") and b == str(layer) for a, b in zip(parts, parts[1:], strict=False))
        if simulation.targets[name].part == place and numbered and parts[-1] in words:
            found.append(parts[-1])
    return found
