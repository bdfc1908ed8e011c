"""fp8, weight-only: E4M3 (finite), one scale per output channel.

Before: `MatMul(x, W [K, N])`. After: `MatMul(x, DequantizeLinear(Q float8e4m3fn [K, N], s [N], axis=1))`, standard ONNX of opset 19.
`W[k, n] ≈ s[n] · Q[k, n]`, `s[n] = max|W[:, n]| / 448`, 448 being the largest E4M3 number; rounding to the nearest, ties to even.

The token table stays in the base precision, also where it is the head: ONNX looks no fp8 rows up. So does the patch embedding. onnxruntime
widens the codes in each run, which is slow; TensorRT-RTX fuses the pair into the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from tmc_export.quantize._channels import ChannelScheme
from tmc_export.quantize._contract import SCHEMES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["FP8", "to_e4m3"]


def to_e4m3(ratio: Array) -> Array:
    """Round to E4M3; the ratios are within ±448, above which it has no finite number.

    >>> import numpy as np
    >>> to_e4m3(np.array([1.0625, 1.1875, 448.0], np.float32)).astype(np.float32).tolist()
    [1.0, 1.25, 448.0]
    """
    import ml_dtypes

    return ratio.astype(ml_dtypes.float8_e4m3fn)


FP8 = ChannelScheme("fp8", ir.DataType.FLOAT8E4M3FN, 448.0, to_e4m3, frozenset({"MatMul", "Gemm"}))
"""The scheme."""

SCHEMES.register("fp8")(FP8.apply)
