"""What a user should know of a legal plan: what was never run, what it falls back to, what is not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tmc_export.plan._weights import patch_kernel
from tmc_export.plan.building import build_memory, built_on_device
from tmc_export.plan.memory import Room, gib, holds_float16, run_memory, shared_in_place
from tmc_export.plan.stored import stored_notes
from tmc_export.plan.types import Plan, QuantizePlan
from tmc_export.recipe import Device, Recipe

__all__ = ["emitted_opset", "notes_of"]

TRACED = 21
"""The newest opset that graphs are traced in."""
OPSETS = {"int4": 21, "nvfp4": 23}
"""What a scheme's `DequantizeLinear` needs above the 20 that every device's TensorRT takes."""
_EXACT = "float32"
"""What calibration computes in."""
_AS_WEIGHTS = ("int8", "fp8", "nvfp4")
"""Schemes that NVIDIA's documents of standard TensorRT do not name for weights beside wider activations; int4 is the one they name."""


def emitted_opset(plan: Plan, device: Device) -> int:
    """Return the ONNX opset that a bundle's graphs are traced in: what the device's TensorRT takes, or what the schemes need, up to 21.

    nvfp4 raises the graphs that hold it to 23 by itself.
    """
    return min(TRACED, max(device.tensorrt.opset, *map(_opset, plan.quantize.values()), 0))


def _opset(scheme: QuantizePlan) -> int:
    """What a scheme needs above the 20; int8 in blocks needs what int4 does."""
    blocks = scheme.stored is not None and scheme.block > 0
    return OPSETS["int4"] if blocks else OPSETS.get(scheme.weights, 0)


def notes_of(recipe: Recipe, plan: Plan, device: Device, room: Room | None) -> tuple[str, ...]:
    """What a user should know of a legal plan: what was never run, what it falls back to, what is not known."""
    found: list[str] = []
    runtime = recipe.target.runtime
    if runtime == "onnxruntime" and device.kind != "cpu":
        found.append(f"runtime: onnxruntime runs on the CPU of '{device.name}', not on its GPU")
    if runtime != "onnxruntime" and plan.dtype == "float32":
        found.append("TensorRT does not fuse float32 attention; float16 takes less memory and time")
    if built_on_device(device, runtime):
        found += _on_device(recipe, plan, device, room)
    if recipe.target.memory_tight and runtime != "onnxruntime":
        found.append("memory_tight has no effect on TensorRT engines: one engine serves all phases")
    elif recipe.target.memory_tight and not shared_in_place(plan):
        found.append(
            "memory_tight shares only floating-point weights between onnxruntime's sessions; codes are held by one phase at a time, and "
            "loaded again when a turn begins and when its answer does"
        )
    if recipe.target.memory_tight and runtime == "onnxruntime" and holds_float16(plan):
        found.append("memory_tight has float16 weights turned into float32 by every run, one at a time: each token takes longer")
    decoder = plan.quantize.get("decoder")
    if (
        recipe.target.memory_tight
        and runtime == "onnxruntime"
        and decoder is not None
        and (decoder.weights, decoder.activations) == ("int8", None)
    ):
        found.append(
            "memory_tight has onnxruntime round the inputs of int8 products in runs of 128 instead of 32 (not under int4_accuracy=1): "
            "less exact"
        )
    if recipe.target.build_memory_gib is not None and runtime == "onnxruntime":
        found.append("build_memory_gib has no effect with onnxruntime, for which no engine is built")
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
    return (*found, *_schemes(recipe, plan), *stored_notes(plan), *_scheme_notes(recipe, plan), *_learned_notes(plan))


def _schemes(recipe: Recipe, plan: Plan) -> list[str]:
    """What is rounded, and how; the codes that a checkpoint brings have notes of their own."""
    parts: dict[str, list[str]] = {}
    for part, scheme in plan.quantize.items():
        if scheme.stored is None:
            parts.setdefault(_says(part, scheme), []).append(part)
    found = [f"{', '.join(names)}: {what}" for what, names in parts.items()]
    given = recipe.quantize.calibration
    if given is not None:
        ends = f"percentile {given.percentile_used:g}" if given.observer == "percentile" else given.observer
        ranges = any(scheme.activations or part == "kv" for part, scheme in plan.quantize.items())
        found.append(
            f"calibration: at most {given.samples} questions of '{given.prompts}' are answered in {_EXACT}, after compression"
            + (f"; ranges by {ends}" if ranges else "")
        )
    return found


def _says(part: str, scheme: QuantizePlan) -> str:
    blocks = f" in blocks of {scheme.block}" if scheme.weights in ("int4", "nvfp4") else ""
    inputs = f", beside {scheme.activations} inputs" if scheme.activations is not None else ""
    found = f", by {scheme.algorithm}" if scheme.weights == "int4" else ""
    smooth = f", smoothed by {scheme.smooth:g}" if scheme.smooth is not None else ""
    keep = f"; kept: {', '.join(scheme.keep)}" if scheme.keep else ""
    return f"{scheme.weights} {'slots' if part == 'kv' else 'weights'}{blocks}{inputs}{found}{smooth}{keep}"


def _on_device(recipe: Recipe, plan: Plan, device: Device, room: Room | None) -> list[str]:
    """What a board's TensorRT may refuse: opsets above the safe one, and codes as weights alone."""
    version, safe = device.tensorrt.version, device.tensorrt.opset
    newest = max(map(_opset, plan.quantize.values()), default=0)
    found = []
    if newest > safe:
        found.append(
            f"TensorRT {version} is taken as safe up to opset {safe}, the graphs are opset {newest}: not run on a board; "
            "build_on_device.sh tries it there"
        )
    if any(scheme.weights == "int4" and scheme.block == 32 for scheme in plan.quantize.values()):
        found.append("int4 in blocks of 32: NVIDIA's documents of TensorRT name 64 and 128; not run on a board")
    if any(s.stored is not None and s.weights == "int8" and s.block for s in plan.quantize.values()):
        found.append("int8 in blocks: NVIDIA's documents of TensorRT name int4 alone; not run on a board")
    for name, parts in _by_scheme(plan).items():
        alone = any(plan.quantize[part].activations is None for part in parts)
        if OPSETS.get(name, 0) > safe or (alone and name in _AS_WEIGHTS):
            found.append(f"{name} on TensorRT {version}: not run; {_fallback(recipe, plan, room, parts)}")
    return found


def _by_scheme(plan: Plan) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part, scheme in plan.quantize.items():
        found.setdefault(scheme.weights, []).append(part)
    return found


def _scheme_notes(recipe: Recipe, plan: Plan) -> list[str]:
    """What a scheme leaves as it is, and where it is read slowly."""
    encoder, head = plan.quantize.get("encoder"), plan.quantize.get("head")
    schemes = _by_scheme(plan)
    found = []
    same = encoder is not None and encoder.weights == "fp16" and plan.dtype == "float16"
    if encoder is not None and encoder.weights != "int8" and not same and patch_kernel(plan.facts):
        found.append(f"encoder: the patch embedding stays in {plan.dtype}: a convolution, of the schemes int8 alone stores it")
    if head is not None and head.weights == "fp8":
        found.append(f"head: the token table stays in {plan.dtype}, of which fp8 codes are stored besides; ONNX looks no fp8 rows up")
    if recipe.target.runtime == "onnxruntime":
        weights = [part for part in schemes.get("fp8", ()) if part != "kv"]
        slow = [f"fp8 of the {', '.join(weights)}"] if weights else []
        slow += ["int8 of the head"] if head is not None and head.weights == "int8" else []
        kv = plan.quantize.get("kv")
        if kv is not None and (kv.weights == "fp8" or (kv.weights == "int8" and (plan.dtype != "float32" or any(plan.windows)))):
            slow.append(f"{kv.weights} slots")
        found += [f"onnxruntime widens {what} in each run, which is slow" for what in slow]
    else:
        short = [name for name in ("fp16", "bf16") if plan.dtype == "float32" and name in schemes]
        found += [f"TensorRT-RTX widens {name} weights as it builds: beside float32 its engines hold float32" for name in short]
        if any(plan.quantize[part].activations is None for part in schemes.get("nvfp4", ())):
            found.append("TensorRT-RTX widens nvfp4 weights alone before each product: they are small, and read no faster than float16")
        if "nvfp4" in schemes:
            found.append("onnxruntime does not execute nvfp4: the answers of these graphs are not run at build time")
    return found


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


def _fallback(recipe: Recipe, plan: Plan, room: Room | None, parts: Sequence[str]) -> str:
    """What the parts of a scheme fall back to; it must fit, too."""
    plain = replace(plan, quantize={k: v for k, v in plan.quantize.items() if k not in parts})
    running = run_memory(plain, recipe.target.runtime, recipe.target.memory_tight).total
    building = max(engine.peak for engine in build_memory(plain))
    if room is not None and max(running, building) > room.free:
        return f"no fallback: {plan.dtype} weights would take {gib(running)}, their build {gib(building)}, of {gib(room.free)}"
    whose = "the unquantized model's " if any(plan.quantize[part].stored is not None for part in parts) else ""
    return f"the fallback is {whose}{plan.dtype} weights ({gib(running)} when it runs, {gib(building)} to build)"
