"""nvfp4 activations by what is written here, twice: with torch, and as standard ONNX in the place of TensorRT's operator.

`S = max|x| of 16 / (6 · g)` in E4M3, at most 448; `Q = x / (g · S)` in E2M1, at most 6; both to the nearest, ties to even.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from tmc_export.quantize.nvfp4 import dequantize_nvfp4

__all__ = ["four", "with_standard_operators"]


def four(x: torch.Tensor, g: float) -> torch.Tensor:
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    scale = (blocks.abs().amax(-1, keepdim=True) / (6 * g)).clamp(max=448).to(torch.float8_e4m3fn).float() * g
    ratio = (blocks / scale.where(scale > 0, torch.ones(()))).clamp(-6, 6)
    codes = torch.from_numpy(ratio.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    return (codes * scale).reshape(x.shape)


class _Graph:
    """Nodes put before one, and what they give."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self.model, self.before = model, before

    def __call__(self, operator: str, *inputs: ir.Value | np.ndarray | float, **attributes: int) -> ir.Value:
        node = ir.node(operator, [i if isinstance(i, ir.Value) else self.constant(i) for i in inputs], attributes=attributes)
        self.model.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, number: np.ndarray | float) -> ir.Value:
        array = number if isinstance(number, np.ndarray) else np.array(number, np.float32)
        node = ir.node("Constant", [], attributes={"value": ir.tensor(array)})
        self.model.graph.insert_before(self.before, node)
        return node.outputs[0]


def _rounded(model: ir.Model, node: ir.Node) -> ir.Value:
    """What TensorRT's operator and the two `DequantizeLinear` behind it give."""
    do, (x, g) = _Graph(model, node), node.inputs
    shape = [int(n) for n in x.shape]
    blocks = do("Reshape", x, np.array([*shape[:-1], shape[-1] // 16, 16]))
    peak = do("ReduceMax", do("Abs", blocks), np.array([-1]), keepdims=1)
    wanted = do("Min", do("Div", peak, do("Mul", g, 6.0)), 448.0)
    scale = do("Mul", do("Cast", do("Cast", wanted, to=ir.DataType.FLOAT8E4M3FN), to=ir.DataType.FLOAT), g)
    ratio = do("Div", blocks, do("Where", do("Greater", scale, 0.0), scale, 1.0))
    size = do("Min", do("Abs", ratio), 6.0)
    step = do("Where", do("Less", size, 2.0), 0.5, do("Where", do("Less", size, 4.0), 1.0, 2.0))  # between neighbours of E2M1
    codes = do("Mul", do("Mul", do("Round", do("Div", size, step)), step), do("Sign", ratio))  # Round: ties to even
    return do("Reshape", do("Mul", codes, scale), np.array(shape))


def with_standard_operators(file: Path, out: Path) -> int:
    """Write a graph that onnxruntime runs; returns how many inputs are rounded in it."""
    model = ir.load(file)
    operators = [n for n in model.graph if n.domain == "trt"]
    for node in operators:
        assert node.op_type == "TRT_FP4DynamicQuantize"
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        assert given == {"axis": -1, "block_size": 16, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
        (inner,) = (use.node for use in node.outputs[1].uses())
        (outer,) = (use.node for use in node.outputs[0].uses())
        assert inner.op_type == outer.op_type == "DequantizeLinear" and inner.inputs[1] is node.inputs[1]
        assert outer.inputs[1] is inner.outputs[0] and {n: a.value for n, a in outer.attributes.items()} == {"axis": -1, "block_size": 16}
        outer.outputs[0].replace_all_uses_with(_rounded(model, node))
        model.graph.remove([outer, inner, node], safe=True)
    for node in [n for n in model.graph if n.op_type == "DequantizeLinear" and n.attributes.get_int("block_size", 0)]:
        inner = node.inputs[1].producer()
        wide = dequantize_nvfp4(node.inputs[0].const_value.numpy(), *(i.const_value.numpy() for i in inner.inputs))
        node.outputs[0].replace_all_uses_with(_Graph(model, node).constant(wide.astype(np.float32)))
        model.graph.remove([node, inner], safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
        elif isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)
    ir.save(model, out)
    return len(operators)
