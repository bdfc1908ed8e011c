"""Tensors that are computed when they are asked for and forgotten at once, so that a graph holds names and shapes, not weights.

`onnx_ir` is imported by whoever makes such a tensor; this module needs it and is used by the build side only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["KeyedTensor", "derive", "key_of"]


class KeyedTensor(ir.LazyTensor):
    """A tensor computed at use.

    Attributes:
        key: says what the bytes are; equal keys mean equal bytes, which are stored once.
    """

    def __init__(self, key: str, load: Callable[[], ir.TensorProtocol], dtype: ir.DataType, shape: tuple[int, ...], name: str) -> None:
        super().__init__(load, dtype=dtype, shape=ir.Shape(shape), name=name, cache=False)
        self.key = key


def derive(
    source: ir.TensorProtocol,
    how: str,
    function: Callable[[Any], Any],
    *,
    shape: tuple[int, ...],
    name: str,
    dtype: ir.DataType | None = None,
) -> KeyedTensor:
    """Return `function(source.numpy())` as a tensor that is computed at use.

    Args:
        source: a tensor, lazy or not.
        how: short name of the computation, part of the key: `"transpose(1, 0)"`.
        function: numpy array → numpy array of `shape`.
        shape: of the result.
        name: of the result.
        dtype: of the result; that of the source when None. A 4-bit type takes an array of one byte a value.
    """
    wanted = source.dtype if dtype is None else dtype

    def load() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(function(source.numpy())), dtype=wanted, name=name)

    return KeyedTensor(f"{key_of(source)}|{how}", load, wanted, shape, name)


def key_of(source: ir.TensorProtocol) -> str:
    """Say what the bytes of a source are: a name alone says nothing, two graphs may give it to different constants."""
    if isinstance(source, KeyedTensor):
        return source.key
    return f"{hashlib.sha256(source.tobytes()).hexdigest()}:{source.dtype}:{list(source.shape.numpy())}"
