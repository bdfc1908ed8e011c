"""A weight as a scheme's graph multiplies it: rounded by the scheme's own functions, and float again.

What measures a scheme without building a bundle computes with these. `x W` stands for the product in a graph, `W [K, N]` the transpose of
the model's `[N, K]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.core.errors import LegalityError, ModelError
from tmc_export.quantize._channels import ChannelScheme, channel_scales, quantize_channels
from tmc_export.quantize._contract import WeightPlan
from tmc_export.quantize.bf16 import BF16
from tmc_export.quantize.fp8 import FP8
from tmc_export.quantize.fp16 import FP16
from tmc_export.quantize.int4 import dequantize_blocks, quantize_blocks
from tmc_export.quantize.int8 import INT8
from tmc_export.quantize.nvfp4 import BLOCK, dequantize_nvfp4, global_scale, quantize_nvfp4

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["READS", "rounded_weight", "shared_scale"]

_CHANNELS = {"int8": INT8, "fp8": FP8}
_NARROW = {"bf16": BF16, "fp16": FP16}
_PRODUCTS = frozenset({"MatMul"})
READS = {
    **{name: scheme.reads for name, scheme in _CHANNELS.items()},
    **dict.fromkeys(_NARROW, frozenset({"MatMul", "Gemm", "Gather"})),
    "int4": _PRODUCTS,
    "nvfp4": _PRODUCTS,
}
"""Scheme → operators that read weights of it; what others read stays in the base precision."""


def rounded_weight(
    name: str,
    weight: Array,
    scheme: WeightPlan,
    *,
    divisor: Array | None = None,
    chosen: tuple[Array, Array] | None = None,
    shared: Array | None = None,
) -> Array:
    """Return what a graph multiplies with in the place of a weight.

    Args:
        name: in the checkpoint, for messages.
        weight: `[N, K]`, or a kernel `[N, …]`, in the plan's dtype.
        scheme: of its part.
        divisor: `[K]`, what the product's input is divided by: the weight's input channels are multiplied first.
        chosen: int4 codes `[K, N]` and scales that calibration chose.
        shared: nvfp4's scale of all weights that read the same input; this weight's own when None.

    Returns:
        float32 of the weight's shape, with the divisor still in it.

    Raises:
        ModelError: the scheme cannot hold a value.
        LegalityError: the scheme's blocks do not divide the input channels.

    >>> from tmc_export.plan.types import QuantizePlan
    >>> rounded_weight("w", np.array([[127.0, 1.4]], np.float32), QuantizePlan("int8")).tolist()
    [[127.0, 1.0]]
    """
    if divisor is not None:
        weight = (weight.astype(np.float32) * divisor).astype(weight.dtype)
    if scheme.weights in _NARROW:
        result: Array = _NARROW[scheme.weights].round(name, weight.astype(np.float32)).astype(np.float32)
        return result
    if scheme.weights in _CHANNELS:
        return _by_channel(name, weight, _CHANNELS[scheme.weights])
    block = BLOCK if scheme.weights == "nvfp4" else scheme.block
    rows = np.ascontiguousarray(weight.reshape(len(weight), -1).T)
    if len(rows) % block:
        raise LegalityError(
            f"block: {block} does not divide the {len(rows)} input channels of '{name}'; name it in keep, or use another block"
        )
    if scheme.weights == "nvfp4":
        scale = shared_scale([name], [weight]) if shared is None else shared
        found = dequantize_nvfp4(*quantize_nvfp4(rows, scale), scale)
    else:
        codes, scales = quantize_blocks(rows, block) if chosen is None else chosen
        found = dequantize_blocks(codes, scales.astype(weight.dtype))
    return np.ascontiguousarray(found.T.astype(np.float32)).reshape(weight.shape)


def shared_scale(names: Sequence[str], weights: Sequence[Array]) -> Array:
    """Return nvfp4's scale of weights that read one input, in their dtype.

    Raises:
        ModelError: a value is not finite.
    """
    peaks = [float(np.maximum(w.max(), -w.min())) if w.size else 0.0 for w in weights]
    for name, peak in zip(names, peaks, strict=True):
        _check_finite(name, np.float32(peak))
    return global_scale(max(peaks), weights[0].dtype.type)


def _by_channel(name: str, weight: Array, scheme: ChannelScheme) -> Array:
    scales = channel_scales(weight, 0, scheme.top)
    _check_finite(name, scales)
    codes = quantize_channels(weight, scales, 0, scheme).astype(np.float32)
    result: Array = codes * scales.astype(np.float32).reshape([-1, *[1] * (weight.ndim - 1)])
    return result


def _check_finite(name: str, values: Any) -> None:
    if not np.isfinite(values).all():
        word = name.removesuffix(".weight")
        raise ModelError(f"tensor '{name}' holds values that are not finite; leave it as it is with quantize.<part>.keep: [{word}]")
