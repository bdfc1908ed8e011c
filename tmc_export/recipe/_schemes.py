"""What a recipe may say under `quantize`: schemes, the parts that take them, and words that stand for something else."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic_core import PydanticCustomError

from tmc_export.core.registry import nearest

__all__ = [
    "ACTIVATION_PARTS",
    "BLOCKS_OF",
    "BUILT",
    "NOT_BUILT_YET",
    "PARTS",
    "PARTS_OF",
    "ActivationScheme",
    "WeightScheme",
    "check_scheme",
]

WeightScheme = Literal["fp16", "bf16", "int8", "int4", "fp8", "nvfp4"]
ActivationScheme = Literal["int8", "fp8", "nvfp4"]

BUILT: tuple[str, ...] = get_args(WeightScheme)
NOT_BUILT_YET: tuple[str, ...] = ("mxfp4", "mxfp8", "uint4", "int2", "int3")

PARTS = ("encoder", "projector", "decoder", "head", "kv")
"""The parts of a model that have a scheme of their own."""

PARTS_OF: dict[str, tuple[str, ...]] = {
    "fp16": PARTS,
    "bf16": ("encoder", "projector", "decoder", "head"),
    "int8": PARTS,
    "int4": ("decoder",),
    "fp8": PARTS,
    "nvfp4": ("encoder", "projector", "decoder"),
}
"""Which parts of a model take which scheme."""

ACTIVATION_PARTS = ("encoder", "projector", "decoder")
"""Parts whose products may quantize what they multiply with; the head reads one row a token, and its weights are what it waits for."""

BLOCKS_OF: dict[str, tuple[int, ...]] = {"int4": (32, 64, 128), "nvfp4": (16,)}
"""Weights that share a scale, for the schemes that have blocks."""

_MEANT = {
    "fp4": "write nvfp4, the only 4-bit floating point that TensorRT reads",
    "awq": "it is an algorithm of int4: write weights: int4, algorithm: awq",
    "gptq": "it is an algorithm of int4: write weights: int4, algorithm: gptq",
    "smoothquant": "it is an option of int8: write weights: int8, activations: int8, smooth: 0.5",
}


def _choice(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def check_scheme(value: object) -> object:
    """Refuse a scheme that is not built, in other words than one that nobody knows or that is written elsewhere."""
    if not isinstance(value, str) or value in BUILT:
        return value
    context: dict[str, object] = {"got": value, "built": _choice(BUILT), "hint": nearest(value, BUILT), "meant": _MEANT.get(value, "")}
    if value in _MEANT:
        raise PydanticCustomError("scheme_elsewhere", "'{got}' is no weight scheme; {meant}", context)
    if value in NOT_BUILT_YET:
        raise PydanticCustomError("scheme_not_built", "the weight scheme '{got}' is not built yet; use {built}", context)
    raise PydanticCustomError("scheme_unknown", "unknown weight scheme '{got}'; use {built}{hint}", context)
