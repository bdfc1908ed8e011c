"""fp8 codes into onnxruntime and out of it: numpy has no such type, so that they are bytes on its side."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from tmc_export.core.errors import BundleError
from tmc_export.runtime._backend import Held

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["FP8", "as_fp8", "run"]

FP8 = "tensor(float8e4m3fn)"
"""onnxruntime's name of the type."""
_FLOAT8E4M3FN = 17
"""Its number in ONNX's `TensorProto.DataType`."""


def as_fp8(name: str, codes: Held) -> ort.OrtValue:
    """The bytes of codes as onnxruntime sees them, in the same memory.

    Args:
        name: of the tensor, for the message.
        codes: uint8, contiguous.

    Raises:
        BundleError: of another type.
    """
    if not isinstance(codes, np.ndarray) or codes.dtype != np.uint8:
        raise BundleError(f"{name} takes fp8 codes as bytes (uint8), not {codes.dtype}; build the bundle again")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(codes, order="C"), _FLOAT8E4M3FN)


def run(session: ort.InferenceSession, names: Sequence[str], feed: Mapping[str, Held]) -> dict[str, Array]:
    """Run a session once; fp8 codes are bytes among its inputs and outputs.

    Args:
        session: the session.
        names: of the outputs.
        feed: every input by name.

    Raises:
        BundleError: codes of another type.
    """
    inputs, outputs = ({value.name: value.type for value in values} for values in (session.get_inputs(), session.get_outputs()))
    given = {name: as_fp8(name, feed[name]) if kind == FP8 else feed[name] for name, kind in inputs.items()}
    if not any(outputs[name] == FP8 for name in names):
        return dict(zip(names, session.run(names, given), strict=True))
    values = {name: value if isinstance(value, ort.OrtValue) else _value(np.asarray(value)) for name, value in given.items()}
    found = session.run_with_ort_values(names, values)  # onnxruntime 1.23 makes no arrays of such outputs
    return {name: _bytes(value) if outputs[name] == FP8 else value.numpy() for name, value in zip(names, found, strict=True)}


def _value(array: Array) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))


def _bytes(value: ort.OrtValue) -> Array:
    """A copy of an output's codes."""
    shape = tuple(value.shape())
    held = (ctypes.c_uint8 * math.prod(shape)).from_address(value.data_ptr())
    return np.ctypeslib.as_array(held).reshape(shape).copy()
