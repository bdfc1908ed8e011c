"""Memory while the engines of a plan are built, and the further cuts that bring it down to what the machine that builds has.

The peak of a build is 2.4 times the weights of the engine plus 0.75 GiB, 3.0 times for int4. Measured with TensorRT-RTX 1.7 on a CPU
(weights → peak, GiB): fp16 0.94 → 3.3, 2.88 → 8.2, 5.75 → 14.1; int4 4.07 → 12.8; the formula gives 3.0, 7.7, 14.6 and 13.0. What
`benchmarks/llava7b_engines.py` measures is in its table beside this formula (int4 3.2 → 10.4, reckoned 10.2). TensorRT on a Jetson: not
run, the same is assumed; so is nvfp4 beside int4, and int8 and fp8 beside fp16. The engine room refuses with the same formula against the
memory that is free when it builds.

Engines are built one after the other, so that the largest counts. A Jetson builds its own in its own memory; TensorRT-RTX engines are built
on any machine, whose memory the recipe names (`target.build_memory_gib`), or `api` fills in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tmc_export.core.errors import LegalityError
from tmc_export.plan._weights import block_bytes, cut_bytes, tower_bytes, vision_bytes, widened
from tmc_export.plan.memory import GIB, Room, brought, codes_of, gib, room_of
from tmc_export.plan.types import BlockPlan, Plan
from tmc_export.recipe import Device, Recipe

__all__ = ["BuildMemory", "Builder", "build_memory", "builder_of", "built_on_device", "even_splits", "peak_of_build"]

_BUILD, _BUILD_BASE = 2.4, 3 * GIB // 4
_BUILD_CODES = {"int4": 3.0, "nvfp4": 3.0}
_RESERVE_BUILDER = 2 * GIB
"""The system's, and that of the process which exports and waits for the engines: 1.1 GiB (measured: benchmarks/llava7b_export.py)."""


@dataclass(frozen=True)
class BuildMemory:
    """The build of one engine: its weights and the expected peak of the building process, bytes."""

    name: str
    weights: int
    peak: int


def built_on_device(device: Device, runtime: str) -> bool:
    """TensorRT engines are built where they run; TensorRT-RTX engines on any machine."""
    return runtime == "tensorrt" and device.tensorrt.flavour == "tensorrt"


def peak_of_build(weights: int, codes: str | None) -> int:
    """Expected peak of an engine's build, bytes; see the module's description.

    Args:
        weights: bytes of the engine's weights.
        codes: the scheme of most of them; None for floating point.
    """
    return int(weights * _BUILD_CODES.get(codes or "", _BUILD)) + _BUILD_BASE


def build_memory(plan: Plan) -> tuple[BuildMemory, ...]:
    """The build of each engine; engines are built one after the other, each in a process of its own."""
    plan = widened(plan)
    found: list[tuple[str, int, str | None]] = [(f"text_tower_{t.index}", tower_bytes(plan, t), None) for t in plan.towers]
    found += [(f"vision_{v.index}", vision_bytes(plan), codes_of(plan, "encoder")) for v in plan.vision]
    for block in plan.blocks:
        cut = plan.cut_before(block.index)
        found += [(f"compress_{block.index}", cut_bytes(plan, plan.cuts.index(cut)), None)] if cut is not None else []
        found.append((f"block_{block.index}", block_bytes(plan, block), codes_of(plan, "decoder")))
    return tuple(BuildMemory(name, weights, peak_of_build(weights, codes)) for name, weights, codes in found)


@dataclass(frozen=True)
class Builder:
    """The machine that builds the engines.

    Attributes:
        room: its memory.
        name: for messages.
        remedy: what helps where its memory is too small for any cut.
    """

    room: Room
    name: str
    remedy: str


def builder_of(recipe: Recipe, device: Device) -> Builder | None:
    """Return who builds the engines of a recipe: the device itself, or the machine of `target.build_memory_gib`.

    Returns:
        None when there are no engines, or nobody says how much memory the machine has.
    """
    runtime, given = recipe.target.runtime, recipe.target.build_memory_gib
    if runtime == "onnxruntime":
        return None
    if built_on_device(device, runtime):
        room = room_of(device, runtime)
        if given is not None:
            room = Room(int(given * GIB), 0 if room is None else room.reserve, unverified=False)
        return None if room is None else Builder(room, f"'{device.name}'", "choose a device with more memory")
    if given is None:
        return None
    remedy = "build on a machine with more memory, and name its GiB in target.build_memory_gib where it is not this one"
    return Builder(Room(int(given * GIB), _RESERVE_BUILDER, unverified=False), "the machine that builds", remedy)


def even_splits(plan: Plan, recipe: Recipe, builder: Builder) -> tuple[int, ...]:
    """Find where to cut blocks further, evenly and as seldom as possible, so that every engine can be built there.

    Raises:
        LegalityError: an encoder, or a single decoder layer, is too large to build there.
    """
    place = recipe.origin(("target", "device"))
    for engine in build_memory(plan):
        if engine.name.startswith("vision_") and engine.peak > builder.room.free:
            raise LegalityError(
                f"{place}: building the engine of {engine.name} needs about {gib(engine.peak)} for {gib(engine.weights)} of weights; "
                f"{builder.name} has {builder.room}; {'write model.dtype: float16, or ' if plan.dtype == 'float32' else ''}{builder.remedy}"
            )
    splits: list[int] = []
    for block in plan.blocks:
        splits += _splits_of(plan, block, builder, f"{place}: ")
    return tuple(splits)


def _splits_of(plan: Plan, block: BlockPlan, builder: Builder, place: str) -> Sequence[int]:
    codes, plan = codes_of(plan, "decoder"), widened(plan)
    layers = block.last - block.first
    for parts in range(1, layers + 1):
        edges = [block.first + (layers * i) // parts for i in range(parts + 1)]
        pieces = [BlockPlan(0, a, b, 0, 0, 0, {}, block.head and b == block.last) for a, b in pairwise(edges)]
        worst = max(block_bytes(plan, piece) for piece in pieces)
        if peak_of_build(worst, codes) <= builder.room.free:
            return edges[1:-1]
    raise LegalityError(
        f"{place}building an engine of a single decoder layer (the largest holds {gib(worst)} of weights) needs about "
        f"{gib(peak_of_build(worst, codes))}; {builder.name} has {builder.room}; "
        f"{'' if codes == 'int4' or brought(plan) else 'quantize to int4, or '}{builder.remedy}"
    )
