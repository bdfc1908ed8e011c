"""The weight schemes a recipe may name: those that are built, and those that are known but not built yet."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic_core import PydanticCustomError

from tmc_export.core.registry import nearest

__all__ = ["BUILT", "NOT_BUILT_YET", "PARTS_OF", "WeightScheme", "check_scheme"]

WeightScheme = Literal["fp16", "int4"]

BUILT: tuple[str, ...] = get_args(WeightScheme)
NOT_BUILT_YET: tuple[str, ...] = ("int8", "fp8", "fp4", "nvfp4", "mxfp4", "awq", "gptq", "smoothquant", "bf16", "uint4", "int2")
PARTS_OF: dict[str, tuple[str, ...]] = {"fp16": ("encoder", "projector", "decoder", "head", "kv"), "int4": ("decoder",)}
"""Which parts of a model take which scheme."""


def check_scheme(value: object) -> object:
    """Refuse a scheme that is not built, in other words than one that nobody knows."""
    if not isinstance(value, str) or value in BUILT:
        return value
    context: dict[str, object] = {"got": value, "built": " or ".join(BUILT), "hint": nearest(value, BUILT)}
    if value in NOT_BUILT_YET:
        raise PydanticCustomError("scheme_not_built", "the weight scheme '{got}' is not built yet; use {built}", context)
    raise PydanticCustomError("scheme_unknown", "unknown weight scheme '{got}'; use {built}{hint}", context)
