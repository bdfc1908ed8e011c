"""Tensors of a checkpoint, read when they are asked for."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from tmc_export.export.checkpoint import TensorSource
from tmc_export.export.lazy_tensors import KeyedTensor

__all__ = ["CheckpointTensor", "numpy_of", "torch_dtype"]

_IR_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """The torch dtype of a graph's."""
    return next(found for found, kind in _IR_DTYPES.items() if kind == dtype)


def numpy_of(tensor: torch.Tensor) -> Any:
    """A numpy array of a torch tensor; bfloat16 through `ml_dtypes`."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


class CheckpointTensor(KeyedTensor):
    """One tensor of a checkpoint, under its state-dict name in the model, or of a method's learned weights, under the method's name."""

    def __init__(self, checkpoint: TensorSource, key: str, dtype: torch.dtype, shape: tuple[int, ...], *, name: str) -> None:
        def load() -> ir.TensorProtocol:
            return ir.Tensor(numpy_of(checkpoint.read(key, dtype)), dtype=_IR_DTYPES[dtype], name=name)

        super().__init__(checkpoint.identity(key), load, _IR_DTYPES[dtype], shape, name)
