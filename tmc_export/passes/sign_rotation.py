"""Turn the sign of the sine once, not half of every query and key.

Before, per layer: `Mul(Concat(Neg(x2), x1), sin)`. After: `Mul(Concat(x2, x1), Mul(sin, [-1 .. -1, 1 .. 1]))`, whose second factor is made
once for all layers. Every product has the same value as before, bit for bit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.passes._rewrite import constant, made_by, sizes

__all__ = ["SignRotationPass"]


class SignRotationPass(ir.passes.InPlacePass):
    """Move the negation of a rotary embedding to the sine. Shapes must be numbers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any negation went away."""
        signed: dict[tuple[ir.Value, int], ir.Value] = {}
        found = [node for node in model.graph if node.op_type == "Mul" and node.domain in ("", "ai.onnx")]
        return ir.passes.PassResult(model, any([_move(model.graph, node, signed) for node in found]))


def _move(graph: ir.Graph, node: ir.Node, signed: dict[tuple[ir.Value, int], ir.Value]) -> bool:
    for place in (0, 1):
        turned, sine = made_by(node.inputs[place], "Concat"), node.inputs[1 - place]
        negated = made_by(turned.inputs[0], "Neg") if turned is not None and len(turned.inputs) == 2 else None
        if turned is None or negated is None or sine is None or len(turned.outputs[0].uses()) != 1 or turned.outputs[0].is_graph_output():
            continue
        shape, half, whole = sizes(sine), sizes(negated.outputs[0]), sizes(turned.outputs[0])
        last = turned.attributes.get_int("axis", 0) in (-1, len(whole or ()) - 1)
        if shape is None or half is None or whole is None or not last or shape[-1] != whole[-1] or sine.type is None:
            continue
        if (sine, half[-1]) not in signed:
            signed[sine, half[-1]] = _signed(graph, node, sine, half[-1])
        node.replace_input_with(1 - place, signed[sine, half[-1]])
        turned.replace_input_with(0, negated.inputs[0])
        if not negated.outputs[0].uses() and not negated.outputs[0].is_graph_output():
            graph.remove(negated, safe=True)
        return True
    return False


def _signed(graph: ir.Graph, before: ir.Node, sine: ir.Value, half: int) -> ir.Value:
    dtype, width = sine.dtype or ir.DataType.FLOAT, (sizes(sine) or (0,))[-1]
    name = f"signs_{half}_{width - half}_{dtype.name.lower()}"
    signs = constant(graph, name, np.concatenate([-np.ones(half), np.ones(width - half)]), dtype.numpy())
    product = ir.node("Mul", [sine, signs])
    out = product.outputs[0]
    out.name, out.shape, out.type = f"{sine.name}.signed", sine.shape, sine.type
    producer = sine.producer()
    if producer is None:
        graph.insert_before(before, product)
    else:
        graph.insert_after(producer, product)
    return out
