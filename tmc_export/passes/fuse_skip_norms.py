"""A residual sum and the norm behind it as onnxruntime's one operator for both.

Before: `s = Add(a, b)`, `Mul(Div(s, Sqrt(Add(ReduceMean(Pow(s, 2)), ε))), γ)`.
After: `com.microsoft::SkipSimplifiedLayerNormalization(a, b, γ)`, which returns both. onnxruntime makes one
node of the norm by itself, but not of a sum that the next residual reads, too. The norm before the head reads the sum through a Reshape,
which then comes behind it.

For a step of one token, in float32, which starts some two hundred nodes and computes next to nothing in most of them. Only for bundles that
onnxruntime runs: TensorRT knows no such operator.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.passes._rewrite import made_by, replace, reshape, sizes

__all__ = ["SKIPPED", "FuseSkipNormsPass"]

_DOMAIN, _OPERATOR = "com.microsoft", "SkipSimplifiedLayerNormalization"
SKIPPED = f"{_DOMAIN}::{_OPERATOR}"
"""The operator that this pass puts in."""


class FuseSkipNormsPass(ir.passes.InPlacePass):
    """Replace every root-mean-square norm of a sum of two float32 tensors of one shape, and the sum."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any norm was replaced."""
        modified = False
        for node in list(model.graph):
            found = _norm(node)
            total = _sum(found[0]) if found is not None else None
            if found is None or total is None or not _alike(total):
                continue
            _, weight, epsilon = found
            fused = ir.node(_OPERATOR, [*total.inputs, weight], domain=_DOMAIN, attributes={"epsilon": epsilon}, num_outputs=4)
            for out, old in ((fused.outputs[0], node.outputs[0]), (fused.outputs[3], total.outputs[0])):
                out.name, out.shape, out.type = f"{old.name}.skipped", ir.Shape(sizes(total.outputs[0]) or ()), old.type
            for unused in fused.outputs[1:3]:
                unused.name = ""
            model.graph.insert_before(total, fused)
            normed, shape = fused.outputs[0], sizes(found[0]) or ()
            replace(model.graph, node, normed if shape == sizes(normed) else reshape(model.graph, node, normed, shape, "row"))
            replace(model.graph, total, fused.outputs[3])
            modified = True
        if modified:
            model.opset_imports[_DOMAIN] = 1
        return ir.passes.PassResult(model, modified)


def _sum(value: ir.Value) -> ir.Node | None:
    """The Add that makes a value `[1, 1, d]`, or the `[1, d]` that is read of it."""
    view, shape = made_by(value, "Reshape"), sizes(value)
    if view is None:
        return made_by(value, "Add")
    return made_by(view.inputs[0], "Add") if shape is not None and sizes(view.inputs[0]) == (1, *shape) else None


def _norm(node: ir.Node) -> tuple[ir.Value, ir.Value, float] | None:
    """What `Mul(Div(x, Sqrt(Add(ReduceMean(Pow(x, 2)), ε))), γ)` norms over its last axis, γ and ε."""
    if node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
        return None
    for scaled, weight in (node.inputs, node.inputs[::-1]):
        quotient = made_by(scaled, "Div")
        root = made_by(quotient.inputs[1], "Sqrt") if quotient is not None else None
        shifted = made_by(root.inputs[0], "Add") if root is not None else None
        if quotient is None or shifted is None or weight is None or not weight.is_initializer():
            continue
        for mean, epsilon in (shifted.inputs, shifted.inputs[::-1]):
            x, number = quotient.inputs[0], _number(epsilon)
            if x is not None and number is not None and _mean_square(mean, x) and sizes(weight) == (sizes(x) or (0,))[-1:]:
                return x, weight, number
    return None


def _mean_square(mean: ir.Value | None, x: ir.Value) -> bool:
    """Whether a value is the mean of x² over the last axis, which stays with length 1."""
    node = made_by(mean, "ReduceMean")
    square = made_by(node.inputs[0], "Pow") if node is not None else None
    if node is None or square is None or square.inputs[0] is not x or _number(square.inputs[1]) != 2 or len(node.inputs) < 2:
        return False
    axes = node.inputs[1]
    if axes is None or not axes.is_initializer() or axes.const_value is None or node.attributes.get_int("keepdims", 1) != 1:
        return False
    return axes.const_value.numpy().tolist() in ([-1], [len(sizes(x) or ()) - 1])


def _number(value: ir.Value | None) -> float | None:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return float(np.asarray(tensor.numpy()).reshape(())) if tensor is not None and tensor.size == 1 else None


def _alike(total: ir.Node) -> bool:
    """Whether a sum adds two computed float32 tensors `[1, 1, d]`, neither of them spread."""
    a, b = total.inputs
    shape = sizes(total.outputs[0])
    if a is None or b is None or a.is_initializer() or b.is_initializer() or shape is None or len(shape) != 3 or shape[:2] != (1, 1):
        return False
    return sizes(a) == sizes(b) == shape and a.dtype is b.dtype is ir.DataType.FLOAT
