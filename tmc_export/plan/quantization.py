"""Which schemes a device, its capabilities and a runtime take, and which need calibration.

Every refusal names the recipe's line, the reason and a fix. The form of `quantize` was checked when the recipe was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from tmc_export.core.errors import LegalityError
from tmc_export.recipe import PARTS, Device, QuantizePart, Recipe

__all__ = [
    "CODES",
    "LEAST_CAPABILITY",
    "ON_ONNXRUNTIME",
    "check_calibration",
    "check_capability",
    "check_precisions",
    "check_slots",
    "needs_calibration",
    "refuse_capability",
    "refuse_precision",
]

LEAST_CAPABILITY = {
    "float32": "8.0", "float16": "7.5", "bfloat16": "8.0", "fp16": "7.5", "bf16": "8.0", "int8": "7.5", "int4": "8.0", "fp8": "8.9",
    "nvfp4": "10.0",
}  # fmt: skip
"""Precision → the least compute capability that TensorRT-RTX builds it for.

Tried with 1.7.1 for 7.5 to 12.1 (`tests/quantize/test_tensorrt_schemes.py`); 10.0 for FP4 is NVIDIA's figure
(docs.nvidia.com/deeplearning/tensorrt-rtx, Working with Quantized Types). Its support matrix lists no kernels for int8 weights beside wider
activations on 7.5; such engines are built, and executing them was not run.
"""

CODES = ("int8", "fp8")
"""Schemes of the KV slots that are codes, with scales found on data."""

ON_ONNXRUNTIME = ("fp16", "bf16", "int8", "int4", "fp8")
"""Schemes that onnxruntime's CPU provider executes."""

_DEVICE_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "nvfp4": "fp4"}


class _Scheme(Protocol):
    """A part's scheme, of a recipe or of a plan."""

    @property
    def weights(self) -> str: ...
    @property
    def activations(self) -> str | None: ...
    @property
    def algorithm(self) -> str: ...


def _parts(recipe: Recipe) -> Iterator[tuple[str, QuantizePart]]:
    for part in PARTS:
        scheme = recipe.quantize.part(part)
        if scheme is not None:
            yield part, scheme


def check_slots(recipe: Recipe) -> None:
    """Refuse codes in the slots where the runtime does not take them.

    Raises:
        LegalityError: at the line of the scheme.
    """
    kv = recipe.quantize.kv
    if kv is not None and kv.weights in CODES and recipe.target.runtime == "tensorrt":
        instead = "write weights: fp16" if recipe.model.dtype == "float16" else "remove quantize.kv"
        raise LegalityError(
            f"{recipe.origin(('quantize', 'kv', 'weights'))}: quantize.kv.weights: {kv.weights} slots are built for onnxruntime and "
            "tensorrt-rtx; NVIDIA's documents of TensorRT know one scale per tensor where codes are made, and such slots have one per "
            f"head; {instead}"
        )


def needs_calibration(part: str, scheme: _Scheme) -> str | None:
    """Return the key of a part's scheme that is found on data; None when its weights are all it needs."""
    if scheme.activations is not None:
        return "activations"
    if scheme.algorithm != "rtn":
        return "algorithm"
    return "weights" if part == "kv" and scheme.weights in CODES else None


def check_calibration(recipe: Recipe) -> None:
    """Refuse a scheme that lacks its data, and data that no scheme asks for.

    Raises:
        LegalityError: at the line of the scheme, or of `calibration`.
    """
    asking = [(part, key, scheme) for part, scheme in _parts(recipe) if (key := needs_calibration(part, scheme)) is not None]
    given, place = recipe.quantize.calibration, recipe.origin(("quantize", "calibration"))
    if given is None:
        for part, key, scheme in asking:
            raise LegalityError(
                f"{recipe.origin(('quantize', part, key))}: quantize.{part}.{key}: {getattr(scheme, key)} is found on data; add "
                "quantize.calibration: {images: FOLDER, prompts: FILE.jsonl}"
            )
        return
    if not asking:
        raise LegalityError(
            f"{place}: quantize.calibration has nothing to calibrate: no part has activations, algorithm: awq or gptq, or an int8 or "
            "fp8 KV; remove it"
        )
    for part, key, scheme in asking:
        what = f"{scheme.activations} activations" if key == "activations" else f"{scheme.weights} codes"
        if what in ("fp8 activations", "nvfp4 activations", "fp8 codes") and given.observer in ("entropy", "mse"):
            raise LegalityError(
                f"{recipe.origin(('quantize', 'calibration', 'observer'))}: observer: {given.observer} reckons with equal steps, and the "
                f"{what} of quantize.{part} have none; write minmax or percentile"
            )
    if recipe.inputs.images and given.images is None:
        raise LegalityError(f"{place}: quantize.calibration lacks images, and inputs.images is {recipe.inputs.images}; add images: FOLDER")
    if not recipe.inputs.images and given.images is not None:
        raise LegalityError(
            f"{recipe.origin(('quantize', 'calibration', 'images'))}: quantize.calibration.images has nothing to act on: inputs.images "
            "is 0; remove it"
        )


def precisions(recipe: Recipe) -> list[tuple[tuple[str, ...], str]]:
    """Return every precision the recipe asks for, with its place."""
    return [(("model", "dtype"), recipe.model.dtype), *((("quantize", part, "weights"), s.weights) for part, s in _parts(recipe))]


def check_precisions(recipe: Recipe, device: Device) -> None:
    """Refuse precisions that the device does not have, or that the runtime does not execute, and bf16 where it gains nothing.

    Raises:
        LegalityError: at the line of the scheme.
    """
    for where, what in precisions(recipe):
        place = recipe.origin(where)
        refuse_precision(str(place), what, device, recipe.target.runtime if where[0] == "quantize" else "")
        if where[0] != "quantize":
            continue
        if what == "bf16" and recipe.model.dtype != "float32":
            raise LegalityError(
                f"{place}: bf16 weights take as many bytes as {recipe.model.dtype} and hold fewer digits; remove it, or write model.dtype: "
                "float32"
            )


def refuse_precision(place: str, what: str, device: Device, runtime: str) -> None:
    """Refuse a precision that a device does not have, or, of weights, that onnxruntime does not execute.

    Args:
        place: begins the message.
        what: the precision.
        device: the target.
        runtime: what executes weights of that precision; empty where it is of something else.

    Raises:
        LegalityError: with what there is.
    """
    if _DEVICE_NAMES.get(what, what) not in device.precisions:
        raise LegalityError(f"{place}: {what} does not run on '{device.name}'; it has {', '.join(device.precisions)}")
    if runtime == "onnxruntime" and what not in ON_ONNXRUNTIME:
        raise LegalityError(
            f"{place}: onnxruntime's CPU path does not execute {what}; use {', '.join(ON_ONNXRUNTIME)}, or another target.runtime"
        )


def check_capability(recipe: Recipe, capabilities: tuple[str, ...]) -> None:
    """Refuse precisions that one of an engine's compute capabilities has no kernels for.

    Raises:
        LegalityError: at the line of the precision.
    """
    for where, what in precisions(recipe):
        fix = "write int8" if where == ("quantize", "kv", "weights") and what in CODES else "write float16"
        refuse_capability(str(recipe.origin(where)), what, capabilities, fix)


def refuse_capability(place: str, what: str, capabilities: tuple[str, ...], fix: str = "write float16") -> None:
    """Refuse a precision that one of some compute capabilities has no kernels for; `place` begins the message, `fix` stands in it.

    Raises:
        LegalityError: with the least that has.
    """
    least = LEAST_CAPABILITY.get(what)
    for capability in capabilities:
        if least is not None and _number(capability) < _number(least):
            raise LegalityError(
                f"{place}: {what} does not build for compute capability {capability}, it needs {least}; {fix}, "
                f"or leave {capability} out of the target"
            )


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(n) for n in capability.split("."))
