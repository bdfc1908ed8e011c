"""Recognizing the rotary embedding of one decoded token."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from tmc_export.passes._rewrite import made_by, sizes

__all__ = ["Rotation", "rotation_at"]


@dataclass(frozen=True)
class Rotation:
    """`Add(Mul(x, cos), Mul(Concat(Slice(x), Slice(x)), sin))`, x a Reshape of one output of a Split.

    Attributes:
        end: the Add.
        shaped: the Reshape, to `[b, heads, 1, d]`.
        halves: the two Slices, in the order of the Concat.
        factors: cos and sin, `[b, 1, 1, d]`.
    """

    end: ir.Node
    shaped: ir.Node
    halves: tuple[ir.Node, ir.Node]
    factors: tuple[ir.Value, ir.Value]


def rotation_at(node: ir.Node) -> Rotation | None:
    """The rotation that ends in a node, if one does."""
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return None
    for straight, crossed in (node.inputs, reversed(node.inputs)):
        left, right = made_by(straight, "Mul"), made_by(crossed, "Mul")
        turned = made_by(right.inputs[0], "Concat") if right is not None else None
        shaped = made_by(left.inputs[0], "Reshape") if left is not None else None
        if left is None or right is None or turned is None or shaped is None or len(turned.inputs) != 2:
            continue
        first, second = (made_by(value, "Slice") for value in turned.inputs)
        cos, sin, x = left.inputs[1], right.inputs[1], shaped.outputs[0]
        if first is None or second is None or cos is None or sin is None or first.inputs[0] is not x or second.inputs[0] is not x:
            continue
        alone = {use.node for use in x.uses()} == {left, first, second} and not x.is_graph_output()
        alone = alone and all(len(n.outputs[0].uses()) == 1 for n in (left, right, turned, first, second))
        if alone and all((sizes(f) or ())[1:3] == (1, 1) and len(sizes(f) or ()) == 4 for f in (cos, sin)):
            return Rotation(node, shaped, (first, second), (cos, sin))
    return None
