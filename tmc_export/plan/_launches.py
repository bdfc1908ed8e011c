"""Which graphs run for a prompt and for a token, with the operations and the bytes of each run.

A run's bytes are the lower bound of its memory traffic: weights once, keys and values once, what goes in and what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tmc_export.plan._flops import (
    VisionTokens,
    cut_flops,
    decoder_layer_flops,
    encoder_flops,
    head_flops,
    projection_flops,
    tower_flops,
    vision_stage_flops,
    vision_tokens,
)
from tmc_export.plan._weights import WIDTHS, block_bytes, cut_bytes, tower_bytes, vision_bytes
from tmc_export.plan.types import BlockPlan, CutPlan, Plan, TowerPlan, VisionPlan

__all__ = ["Launch", "Part", "cut_launch", "decode_launches", "kv_bytes", "prompt_launches", "slot_bytes", "tower_launch", "vision_launch"]

Part = Literal["encoder", "prefill", "decode"]
"""The three shares of an answer's time; the projector counts to the encoder, cuts to the prefill."""

_SLOT_WIDTHS = {"fp16": 2, "int8": 1, "fp8": 1}
"""Bytes of a key's or value's number in the slots; the scales of codes, one per layer and head, do not count."""


@dataclass(frozen=True)
class Launch:
    """One graph, run some times.

    Attributes:
        name: of the graph, without its phase.
        part: whose share it is.
        runs: how often it runs for the prompt, or for the token.
        flops, moved_bytes: of one run.
    """

    name: str
    part: Part
    runs: int
    flops: int
    moved_bytes: int


def slot_bytes(plan: Plan) -> int:
    """Bytes of keys and values of one token in one layer, for the whole batch: 2 · kv_heads · head_dim · width."""
    d, kv = plan.facts.decoder, plan.quantize.get("kv")
    wide = WIDTHS[plan.dtype] if kv is None else _SLOT_WIDTHS[kv.weights]
    return plan.batch * 2 * d.kv_heads * d.head_dim * wide


def kv_bytes(plan: Plan, block: BlockPlan) -> int:
    """Bytes of a block's static KV slots: capacity · layers · `slot_bytes`."""
    return block.capacity * (block.last - block.first) * slot_bytes(plan)


def _hidden(plan: Plan, tokens: int) -> int:
    return plan.batch * tokens * plan.facts.decoder.width * WIDTHS[plan.dtype]


def vision_launch(plan: Plan, vision: VisionPlan, tokens: VisionTokens | None = None, leaving: int | None = None) -> Launch:
    """Encode one picture; `tokens` and `leaving` replace what the plan says, for what-if questions."""
    inside = tokens or vision_tokens(vision)
    facts, out = vision.facts, vision.tokens if leaving is None else leaving
    flops = encoder_flops(facts, inside.layers) + projection_flops(vision, inside.projected) + vision_stage_flops(vision)
    pixels = 3 * facts.encoder.grid[0] * facts.encoder.grid[1] * facts.encoder.patch**2 * WIDTHS[plan.dtype]
    return Launch(f"vision_{vision.index}", "encoder", plan.images, flops, vision_bytes(plan) + pixels + _hidden(plan, out))


def tower_launch(plan: Plan, tower: TowerPlan) -> Launch:
    """Encode one question."""
    moved = tower_bytes(plan, tower) + tower.tokens * 8 + tower.width * WIDTHS[plan.dtype]
    return Launch(f"text_tower_{tower.index}", "encoder", 1, tower_flops(tower), moved)


def _embed(plan: Plan, part: Part, tokens: int) -> Launch:
    return Launch("embed", part, 1, 0, 2 * _hidden(plan, tokens))


def _block(plan: Plan, block: BlockPlan, part: Part, new: int, past: int) -> Launch:
    d, layers = plan.facts.decoder, block.last - block.first
    flops = layers * decoder_layer_flops(d, new, past + new) + (head_flops(d) if block.head else 0)
    moved = block_bytes(plan, block) + layers * (past + new) * slot_bytes(plan)
    moved += _hidden(plan, new) + (d.vocabulary * WIDTHS[plan.dtype] * plan.batch if block.head else _hidden(plan, new))
    return Launch(f"block_{block.index}", part, 1, plan.batch * flops, moved)


def cut_launch(plan: Plan, cut: CutPlan) -> Launch:
    """Score and compress between two blocks."""
    keys = 0
    if cut.attention("previous"):
        keys += plan.blocks[cut.before_block - 1].capacity * slot_bytes(plan) // 2
    if cut.attention("next"):
        keys += plan.blocks[cut.before_block].capacity * slot_bytes(plan) // 2
    moved = cut_bytes(plan, plan.cuts.index(cut)) + keys + _hidden(plan, cut.tokens_in) + _hidden(plan, cut.tokens_out)
    return Launch(f"compress_{cut.before_block}", "prefill", 1, plan.batch * cut_flops(plan, cut).total, moved)


def prompt_launches(plan: Plan) -> tuple[Launch, ...]:
    """Everything that runs before the first token, for a prompt that fills the bucket; of several picture buckets, the dearest.

    A text tower counts to the encoder, once for the question.
    """
    vision = sorted((vision_launch(plan, v) for v in plan.vision), key=lambda launch: launch.flops)[-1:]
    found = [*(tower_launch(plan, t) for t in plan.towers), *vision, _embed(plan, "prefill", plan.blocks[0].tokens)]
    for block in plan.blocks:
        cut = plan.cut_before(block.index)
        found += [cut_launch(plan, cut)] if cut is not None else []
        found.append(_block(plan, block, "prefill", block.tokens, 0))
    return tuple(found)


def decode_launches(plan: Plan, width: int) -> tuple[Launch, ...]:
    """Everything that runs for one token; reckoned with every slot read, as static graphs do and the last token must."""
    return (_embed(plan, "decode", width), *(_block(plan, b, "decode", width, b.capacity) for b in plan.blocks))
