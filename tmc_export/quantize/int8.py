"""int8, weight-only: one scale per output channel, rounding to the nearest (ties to even), symmetric.

Before: `MatMul(x, W [K, N])`. After: `MatMul(x, DequantizeLinear(Q int8 [K, N], s [N], axis=1))`, standard ONNX of opset 13 (of 19 with
float16 scales). `W[k, n] ≈ s[n] · Q[k, n]`, Q in [-127, 127], no zero point, `s[n] = max|W[:, n]| / 127`. `Gemm` (the head), `Conv` (the
patch embedding) and the token table's look-up are read as `_channels.py` says.

onnxruntime 1.24 and later multiply the codes of a `MatMul` as they are (its 8-bit kernel); those of a `Gemm` or `Conv` are widened in
each run. TensorRT-RTX fuses the pair into the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.quantize._channels import ChannelScheme
from tmc_export.quantize._contract import SCHEMES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["INT8"]


def _round(ratio: Array) -> Array:
    return np.rint(ratio).astype(np.int8)


INT8 = ChannelScheme("int8", ir.DataType.INT8, 127.0, _round, frozenset({"MatMul", "Gemm", "Conv", "Gather"}))
"""The scheme."""

SCHEMES.register("int8")(INT8.apply)
