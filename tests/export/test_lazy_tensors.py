"""Tensors that are computed at use: their keys say what their bytes are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from tmc_export.export.lazy_tensors import KeyedTensor, derive
from tmc_export.export.store import WeightStore


def _transposed(values: np.ndarray, name: str) -> KeyedTensor:
    return derive(ir.Tensor(values, name=name), "transpose(1, 0)", np.transpose, shape=values.shape[::-1], name=f"{name}.t")


def test_constants_of_one_name_and_other_values_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    """Two traced graphs call different constants `val_5`; each must get its own bytes."""
    first, second = np.arange(600, dtype=np.float32).reshape(20, 30), np.full((20, 30), 7, np.float32)
    store, got = WeightStore(tmp_path), []
    for values in (first, second, first):
        tensor = _transposed(values, "val_5")
        value = ir.Value(name="w", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21})
        store.externalize(ir.Model(graph, ir_version=10), "x.data")
        assert value.const_value is not None
        got.append(value.const_value.numpy().copy())
    for array, values in zip(got, (first, second, first), strict=True):
        assert np.array_equal(array, values.T)
    assert (tmp_path / "x.data").stat().st_size == 2 * first.nbytes, "equal bytes are stored once"


def test_a_derived_key_names_its_source() -> None:
    weight = KeyedTensor("layer.weight", lambda: ir.Tensor(np.zeros((2, 2), np.float32)), ir.DataType.FLOAT, (2, 2), "w")
    assert derive(weight, "float16", lambda a: a, shape=(2, 2), name="h").key == "layer.weight|float16"
