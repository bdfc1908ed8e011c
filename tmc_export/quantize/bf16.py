"""bf16, weight-only: matrices of a float32 graph in half the bytes, with float32's range and 8 bits of each number.

Before: `MatMul(x, W float [K, N])`. After: `MatMul(x, Cast(W bfloat16 [K, N], to=float))`. For checkpoints in bfloat16 nothing is lost, and
weights above float16's 65504 are held. Beside float16 arithmetic it would gain nothing: `plan` refuses it there.
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

__all__ = ["BF16", "to_bfloat16"]


def to_bfloat16(name: str, weight: Array) -> Array:
    """Round to bfloat16, ties to even.

    Raises:
        ModelError: a value is beyond bfloat16's range (3.39e38), or not a number.
    """
    import ml_dtypes

    rounded: Array = weight.astype(ml_dtypes.bfloat16)
    if not np.isfinite(rounded.astype(np.float32)).all():
        word = name.removesuffix(".weight")
        raise ModelError(f"tensor '{name}' holds values that bfloat16 cannot; leave it in float32 with quantize.<part>.keep: [{word}]")
    return rounded


BF16 = NarrowScheme("bf16", "bfloat16", ir.DataType.BFLOAT16, to_bfloat16)
"""The scheme."""

SCHEMES.register("bf16")(BF16.apply)
