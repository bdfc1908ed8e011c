"""What a user should know of a legal plan: what was never run, what it falls back to, what is not known."""

from __future__ import annotations

from dataclasses import replace

from tmc_export.plan.memory import Room, build_memory, built_on_device, gib, run_memory, tight_helps
from tmc_export.plan.types import Plan
from tmc_export.recipe import Device, Recipe

__all__ = ["emitted_opset", "notes_of"]

INT4_OPSET = 21
"""What int4 block `DequantizeLinear` needs; nothing newer is emitted."""


def emitted_opset(plan: Plan, device: Device) -> int:
    """Return the ONNX opset of a bundle's graphs: what the device's TensorRT takes, or 21 where int4 blocks need it."""
    if any(scheme.weights == "int4" for scheme in plan.quantize.values()):
        return INT4_OPSET
    return min(INT4_OPSET, device.tensorrt.opset)


def notes_of(recipe: Recipe, plan: Plan, device: Device, room: Room | None) -> tuple[str, ...]:
    """What a user should know of a legal plan: what was never run, what it falls back to, what is not known."""
    found: list[str] = []
    runtime, version = recipe.target.runtime, device.tensorrt.version
    if runtime == "onnxruntime" and device.kind != "cpu":
        found.append(f"runtime: onnxruntime runs on the CPU of '{device.name}', not on its GPU")
    if runtime != "onnxruntime" and plan.dtype == "float32":
        found.append("TensorRT does not fuse float32 attention; float16 takes less memory and time")
    if built_on_device(device, runtime):
        emitted = emitted_opset(plan, device)
        if device.tensorrt.opset < emitted:
            found.append(
                f"TensorRT {version} is taken as safe up to opset {device.tensorrt.opset}, the graphs are opset {emitted}: not run "
                "on a board; build_on_device.sh tries it there"
            )
        scheme = plan.quantize.get("decoder")
        if scheme is not None and scheme.weights == "int4" and device.tensorrt.opset < emitted:
            found.append(f"int4 on TensorRT {version}: not run; {_fallback(recipe, plan, room)}")
    if recipe.target.memory_tight and runtime != "onnxruntime":
        found.append("memory_tight has no effect on TensorRT engines: one engine serves all phases")
    elif recipe.target.memory_tight and not tight_helps(plan):
        found.append("memory_tight shares only float32 weights between onnxruntime's sessions; float16 and int4 are copied in each")
    if "decode_width" in recipe.target.model_fields_set and runtime == "onnxruntime":
        found.append("decode_width has no effect with onnxruntime, which takes one token at a time")
    if len(plan.vision) > 1 and plan.cuts:
        found.append("budgets at decoder sites are counted for the picture bucket of the most tokens; a smaller picture keeps as many")
    if plan.query_aware_vision:
        found.append("pictures are encoded with their turn's question: none can be encoded ahead of it or shared between prompts")
    if room is None:
        found.append("memory is not checked here: it depends on the machine")
    if len(plan.vision) > 1:
        found.append("operations, bytes and times are of the dearest picture bucket")
    return (*found, *_learned_notes(plan))


def _learned_notes(plan: Plan) -> list[str]:
    """What a user should know of learned weights: which were never trained, and how their operations are reckoned."""
    stages = [*(s for v in plan.vision for s in v.stages), *(s for c in plan.cuts for s in c.stages)]
    learned = {s.entry: s for s in stages if s.weights is not None}
    found = [
        f"compress.{entry}: {stage.method} at {stage.stage.at}: random weights (seed {stage.weights.random}), accuracy n/a"
        for entry, stage in learned.items()
        if stage.weights is not None and stage.weights.random is not None
    ]
    if learned:
        names = ", ".join(sorted({s.method for s in learned.values()}))
        found.append(f"operations of learned weights ({names}) are an estimate: every matrix times every token that arrives")
    return found


def _fallback(recipe: Recipe, plan: Plan, room: Room | None) -> str:
    """The scheme that int4 falls back to; it must fit, too."""
    plain = replace(plan, quantize={k: v for k, v in plan.quantize.items() if k != "decoder"})
    running = run_memory(plain, recipe.target.runtime, recipe.target.memory_tight).total
    building = max(engine.peak for engine in build_memory(plain))
    if room is not None and max(running, building) > room.free:
        return f"no fallback: {plan.dtype} weights would take {gib(running)}, their build {gib(building)}, of {gib(room.free)}"
    return f"the fallback is {plan.dtype} weights ({gib(running)} when it runs, {gib(building)} to build)"
