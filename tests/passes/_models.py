"""Small graphs written as text, and their outputs on onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


def graph(text: str, **weights: NDArray[Any]) -> ir.Model:
    """Read `(float[T, 4] x) => (float[T, 2] y) { … }`; `weights` become initializers."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\ng {text}')
    for name, array in weights.items():
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        for node in model.graph:
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, value)
        model.graph.initializers[name] = value
    return model


def run(model: ir.Model, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Run on onnxruntime's CPU provider, without its own rewriting; fp8 codes are bytes, in and out."""
    import onnxruntime as ort

    from tmc_export.runtime import _fp8

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(_fp8.run(session, [o.name for o in session.get_outputs()], {i.name: feed[i.name] for i in session.get_inputs()}).values())


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]
