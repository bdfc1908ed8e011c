"""What a plan costs on a device: operations, bytes, times, and the bound on what compression can win. Estimates, and labelled so.

A run of a graph takes at least max(operations / peak rate, bytes / peak bandwidth): the roofline with an efficiency of 1.0. Real times
are longer; their ratios are what the figures are for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from tmc_export.graphs._contract import Site
from tmc_export.plan._flops import (
    CutFlops,
    LayerTokens,
    VisionTokens,
    cut_flops,
    encoder_flops,
    head_flops,
    projection_flops,
    tower_flops,
    vision_stage_flops,
    vision_tokens,
)
from tmc_export.plan._launches import Launch, decode_launches, kv_bytes, prompt_launches, vision_launch
from tmc_export.plan._weights import WeightBytes, weight_bytes, widened
from tmc_export.plan.types import BlockPlan, Plan
from tmc_export.recipe import Device

__all__ = ["LABEL", "Amdahl", "Clock", "Estimate", "clock_of", "estimate", "limit_at", "shares_of"]

LABEL = "estimate: roofline lower bound (efficiency 1.0)"


@dataclass(frozen=True)
class Clock:
    """What turns operations and bytes into seconds.

    Attributes:
        rate: operations a second at the plan's precision; None when unknown.
        bandwidth: bytes a second; None when unknown.
        unverified: names of the figures used that were not read in a document of the maker.
        why_not: why there are no times; empty when there are.
    """

    rate: float | None
    bandwidth: float | None
    unverified: tuple[str, ...] = ()
    why_not: str = ""

    def seconds(self, launches: Iterable[Launch]) -> float | None:
        """Time of some runs; None without figures."""
        if self.rate is None or self.bandwidth is None:
            return None
        return sum(x.runs * max(x.flops / self.rate, x.moved_bytes / self.bandwidth) for x in launches)

    def effort(self, launches: Iterable[Launch]) -> float:
        """Time, or operations where there is no time: what shares and limits are taken of."""
        launches = tuple(launches)
        seconds = self.seconds(launches)
        return sum(float(x.runs * x.flops) for x in launches) if seconds is None else seconds


@dataclass(frozen=True)
class Estimate:
    """The cost of one plan. Bytes and operations are exact for the shapes; times are lower bounds.

    Attributes:
        flops: by part, for a prompt that fills the bucket: encoder, projector, prefill, cuts, head; and `decode`, for one token;
            with text towers also `text tower`, for one question.
        blocks_flops: prefill operations of each block, head included.
        duplicated_flops: query and key projections that cuts compute once more; part of `flops["cuts"]`.
        cuts: what each cut costs, of one item of the batch.
        weights: stored bytes.
        kv_bytes: static slots of each block.
        prompt_dispatches, token_dispatches: graph launches before the first token, and per token.
        first_token_s, token_s, answer_s: lower bounds in seconds; None where the device's figures are unknown. The answer has
            `new_tokens` tokens.
    """

    flops: dict[str, int]
    blocks_flops: tuple[int, ...]
    duplicated_flops: int
    cuts: tuple[CutFlops, ...]
    weights: WeightBytes
    kv_bytes: tuple[int, ...]
    prompt_dispatches: int
    token_dispatches: int
    first_token_s: float | None
    token_s: float | None
    answer_s: float | None

    @property
    def prompt_flops(self) -> int:
        """Operations before the first token."""
        return sum(v for k, v in self.flops.items() if k != "decode")


@dataclass(frozen=True)
class Amdahl:
    """The most that compression could win.

    Attributes:
        encoder, prefill, decode: shares of an uncompressed answer, together 1.
        basis: whether shares and limits are of estimated time, or of operations where there is none.
        limits: per recipe entry: index, site, and how many times faster the first token and the whole answer could at most become with
            every visual token gone at that site, at no cost.
    """

    encoder: float
    prefill: float
    decode: float
    basis: Literal["time", "operations"]
    limits: tuple[tuple[int, str, float, float], ...] = ()


def clock_of(plan: Plan, device: Device, runtime: str) -> Clock:
    """Choose the device's figures for a plan: int4 weights compute at the base precision."""
    if runtime == "onnxruntime" and device.kind != "cpu":
        return Clock(None, None, (), "onnxruntime runs on the CPU, and the device's figures are its GPU's")
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "fp16"}[plan.dtype]
    rate, bandwidth = device.rate(precision), device.memory_bandwidth_gb_s
    figures = {f"tflops.{precision}": rate, "memory_bandwidth_gb_s": bandwidth}
    unknown = [name for name, figure in figures.items() if figure is None or figure.value is None]
    if unknown or rate is None or rate.value is None or bandwidth.value is None:
        return Clock(None, None, (), f"the device '{device.name}' has no figure for {' and '.join(unknown)}")
    unverified = tuple(name for name, figure in figures.items() if figure is not None and figure.unverified)
    return Clock(rate.value * 1e12, bandwidth.value * 1e9, unverified)


def estimate(plan: Plan, clock: Clock, runtime: str) -> Estimate:
    """Reckon what a plan costs.

    Args:
        plan: resolved.
        clock: the device's figures.
        runtime: TensorRT engines take `decode_width` tokens at once, onnxruntime one.
    """
    held = widened(plan)
    prompt = prompt_launches(held)
    token = decode_launches(held, width_of(plan, runtime))
    first, each = clock.seconds(prompt), clock.seconds(token)
    blocks = tuple(x.flops for x in prompt if x.name.startswith("block_"))
    d = plan.facts.decoder
    vision = max(plan.vision, key=lambda v: vision_launch(plan, v).flops, default=None)
    encoder = projector = 0
    if vision is not None:
        inside = vision_tokens(vision)
        encoder = plan.images * (encoder_flops(vision.facts, inside.layers) + vision_stage_flops(vision))
        projector = plan.images * projection_flops(vision, inside.projected)
    head = plan.batch * head_flops(d)
    return Estimate(
        flops={
            "encoder": encoder,
            "projector": projector,
            "prefill": sum(blocks) - head,
            "cuts": sum(x.flops for x in prompt if x.name.startswith("compress_")),
            "head": head,
            "decode": sum(x.flops for x in token),
            **({"text tower": sum(tower_flops(t) for t in plan.towers)} if plan.towers else {}),
        },
        blocks_flops=blocks,
        duplicated_flops=plan.batch * sum(cut_flops(plan, cut).duplicated for cut in plan.cuts),
        cuts=tuple(cut_flops(plan, cut) for cut in plan.cuts),
        weights=weight_bytes(plan),
        kv_bytes=tuple(kv_bytes(plan, b) for b in plan.blocks),
        prompt_dispatches=sum(x.runs for x in prompt),
        token_dispatches=sum(x.runs for x in token),
        first_token_s=first,
        token_s=each,
        answer_s=None if first is None or each is None else first + (plan.new_tokens - 1) * each,
    )


def width_of(plan: Plan, runtime: str) -> int:
    """Tokens that a decode graph takes at once."""
    return 1 if runtime == "onnxruntime" else plan.decode_width


def shares_of(plan: Plan, clock: Clock, runtime: str, sites: Iterable[tuple[int, Site]] = ()) -> Amdahl:
    """Return the shares of an uncompressed plan's answer, and the limit at each site (entry index, site)."""
    held = widened(plan)
    prompt, token = prompt_launches(held), decode_launches(held, width_of(plan, runtime))
    encoder = clock.effort(x for x in prompt if x.part == "encoder")
    prefill = clock.effort(x for x in prompt if x.part == "prefill")
    decode = (plan.new_tokens - 1) * clock.effort(token)
    whole = encoder + prefill + decode
    limits = tuple((index, str(site), *limit_at(plan, site, clock, runtime)) for index, site in sites)
    basis: Literal["time", "operations"] = "operations" if clock.rate is None else "time"
    return Amdahl(encoder / whole, prefill / whole, decode / whole, basis, limits)


def limit_at(plan: Plan, site: Site, clock: Clock, runtime: str) -> tuple[float, float]:
    """How many times faster first token and answer become when all visual tokens of an uncompressed plan vanish at `site`, at no cost."""
    plan, width, later = widened(plan), width_of(plan, runtime), plan.new_tokens - 1
    gone = _emptied(plan, site)
    seeing = () if gone.images == 0 else tuple(_emptied_vision(plan, site))
    rest = tuple(x for x in prompt_launches(gone) if x.part != "encoder")
    before = clock.effort(prompt_launches(plan)), clock.effort(decode_launches(plan, width))
    after = clock.effort((*seeing, *rest)), clock.effort(decode_launches(gone, width))
    return before[0] / after[0], (before[0] + later * before[1]) / (after[0] + later * after[1])


def _emptied(plan: Plan, site: Site) -> Plan:
    """The decoder of an uncompressed plan with text alone from `site` on."""
    cut = (site.layer or 0) if site.part == "decoder" else 0
    blocks: list[BlockPlan] = []
    for block in plan.blocks:
        edges = [block.first, *([cut] if block.first < cut < block.last else []), block.last]
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            visual = block.visual_tokens if first < cut else 0
            tokens = plan.images * visual + plan.text_tokens
            part = replace(
                block, index=len(blocks), first=first, last=last, tokens=tokens, visual_tokens=visual, capacity=tokens + plan.new_tokens
            )
            blocks.append(replace(part, head=block.head and last == block.last, query_rows={}, row_sums={}))
    return replace(plan, blocks=tuple(blocks))


def _emptied_vision(plan: Plan, site: Site) -> Iterable[Launch]:
    """The dearest vision graph of an uncompressed plan, with class tokens alone from `site` on."""
    vision = max(plan.vision, key=lambda v: vision_launch(plan, v).flops)
    if site.part in ("projector", "decoder"):
        yield vision_launch(plan, vision, leaving=None if site.part == "decoder" else 0)
        return
    encoder = vision.facts.encoder
    if site.part == "input":
        reached, middle = 0, False
    else:
        reached, middle = encoder.layers if site.layer is None else site.layer, site.point == "mid"
    full, left = encoder.tokens, encoder.class_tokens
    layers = tuple(
        LayerTokens(full if i < reached or (i == reached and middle) else left, full if i < reached else left)
        for i in range(encoder.layers)
    )
    yield vision_launch(plan, vision, VisionTokens(layers, 0), leaving=0)
