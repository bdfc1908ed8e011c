"""nvfp4 codes for what products multiply nvfp4 weights with: the tensor's scale was found on data, its blocks' are found as the graph runs.

Before: `MatMul(x [..., K], W)`. After: `MatMul(DequantizeLinear(Q, DequantizeLinear(S, g), axis=-1, block_size=16), W)` with
`Q [..., K], S [..., K / 16] = trt::TRT_FP4DynamicQuantize(x, g)`: TensorRT's operator, as nvidia-modelopt exports it. Standard ONNX has
none that chooses a block's scale from its values, and onnxruntime no kernel for either.

`S = max|x| of 16 consecutive channels / (6 · g)`, rounded to E4M3, at most 448; `Q = x / (g · S)`, rounded to E2M1, at most 6; both to the
nearest, ties to even. `g = end / (6 · 448)`: a block beyond the end of the range is cut off there. TensorRT-RTX 1.7.1 parses the pattern
and makes kernels of it that multiply codes with codes; executing them was not run, so that the formula is NVIDIA's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.quantize._weights import register
from tmc_export.quantize.nvfp4 import BLOCK, global_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["TOP", "round_to_nvfp4", "rounded_by_nvfp4"]

_TOP_CODE, _TOP_SCALE = 6.0, 448.0
TOP = _TOP_CODE * _TOP_SCALE
"""The largest code times the largest block scale: what the end of a range is divided by."""

_DOMAIN, _OPERATOR = "trt", "TRT_FP4DynamicQuantize"


def round_to_nvfp4(model: ir.Model, reader: ir.Node, source: ir.Value, clip: float, name: str) -> ir.Value:
    """Put the three nodes before a product.

    Args:
        model: changed in place.
        reader: the product.
        source: what it reads, `[..., K]` with K a multiple of 16.
        clip: the end of its range.
        name: begins the names of what is made.

    Returns:
        The rounded tensor, shaped and typed like `source`.
    """
    if source.dtype is None or source.shape is None:
        raise ValueError(f"'{source.name}' has no type or no shape")
    channels = source.shape[-1]
    if not isinstance(channels, int) or channels % BLOCK:
        raise ValueError(f"'{source.name}' has {channels} channels, no multiple of {BLOCK}")
    scale = register(model, ir.tensor(global_scale(clip, source.dtype.numpy()), name=f"{name}.scale"))
    attributes = {"axis": -1, "block_size": BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
    narrow = ir.node(_OPERATOR, [source, scale], attributes=attributes, domain=_DOMAIN, num_outputs=2, name=f"{name}.quantize")
    codes, blocks = narrow.outputs
    inner = ir.node("DequantizeLinear", [blocks, scale], name=f"{name}.dequantize_scale")
    outer = ir.node("DequantizeLinear", [codes, inner.outputs[0]], attributes={"axis": -1, "block_size": BLOCK}, name=f"{name}.dequantize")
    by_block = ir.Shape([*list(source.shape)[:-1], channels // BLOCK])
    for value, word, shape, kind in (
        (codes, "codes", source.shape, ir.DataType.FLOAT4E2M1), (blocks, "scales", by_block, ir.DataType.FLOAT8E4M3FN),
        (inner.outputs[0], "block_scales", by_block, source.dtype), (outer.outputs[0], "rounded", source.shape, source.dtype),
    ):  # fmt: skip
        value.name, value.shape, value.type = f"{name}.{word}", shape, ir.TensorType(kind)
    model.graph.insert_before(reader, [narrow, inner, outer])
    model.opset_imports[_DOMAIN] = 1
    return outer.outputs[0]


def rounded_by_nvfp4(rows: Array, scale: float) -> Array:
    """Return what the three nodes give.

    Args:
        rows: float32 `[..., K]`, K a multiple of 16.
        scale: of the tensor, `g`.

    >>> rounded_by_nvfp4(np.array([6.0, 2.4] + [0.0] * 14, np.float32), 1 / 448)[:2].tolist()
    [6.0, 2.0]
    """
    import ml_dtypes

    blocks = rows.reshape(*rows.shape[:-1], -1, BLOCK)
    wanted = np.minimum(np.abs(blocks).max(-1, keepdims=True) / np.float32(_TOP_CODE * scale), np.float32(_TOP_SCALE))
    wide = wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    ratio = np.clip(blocks / np.where(wide > 0, wide, np.float32(1)), -_TOP_CODE, _TOP_CODE)
    result: Array = (ratio.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * wide).reshape(rows.shape)
    return result
