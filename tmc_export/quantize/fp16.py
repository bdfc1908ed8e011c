"""fp16, weight-only: matrices of a float32 graph are stored in half the bytes and widened when they are read.

Before: `MatMul(x, W float [K, N])`. After: `MatMul(x, Cast(W float16 [K, N], to=float))`. A graph traced in float16
(`model.dtype: float16`) has such weights already and is left as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.core.errors import ModelError
from tmc_export.quantize._contract import SCHEMES
from tmc_export.quantize._narrow import NarrowScheme

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["FP16", "to_half"]


def to_half(name: str, weight: Array) -> Array:
    """Round to float16.

    Raises:
        ModelError: a value is above float16's range, or not a number.
    """
    peak = float(np.abs(weight).max()) if weight.size else 0.0
    if not peak <= float(np.finfo(np.float16).max):
        word = name.removesuffix(".weight")
        raise ModelError(f"tensor '{name}' holds {peak:g}, above float16's 65504; leave it in float32 with quantize.<part>.keep: [{word}]")
    return weight.astype(np.float16)


FP16 = NarrowScheme("fp16", "float16", ir.DataType.FLOAT16, to_half)
"""The scheme."""

SCHEMES.register("fp16")(FP16.apply)
