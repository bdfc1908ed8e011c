"""One Reshape where several follow each other.

Before, in a decode step: `Reshape → Transpose → Add → Reshape`, whose Transpose moves an axis of one. After: one Reshape, as late as it can
stand: a Transpose that moves no element is a Reshape, a Reshape of a Reshape is the second alone, and `Softmax`, `Add` and `Mul` along the
last axis are computed in the shape that came before it; a product with one number comes after it. No value changes.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes

from tmc_export.passes._rewrite import add, made_by, replace, reshape, sizes

__all__ = ["MergeReshapesPass"]


class MergeReshapesPass(ir.passes.InPlacePass):
    """Rewrite reshapes until none can go away. Shapes must be numbers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether anything changed."""
        modified = False
        while any([rule(model.graph, node) for rule in (_still, _sink, _scale, _merge) for node in list(model.graph)]):
            modified = True
        return ir.passes.PassResult(model, modified)


def _still(graph: ir.Graph, node: ir.Node) -> bool:
    """A Transpose that moves only axes of one is a Reshape."""
    if node.graph is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return False
    before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
    if not before or not after or 0 in after:  # a 0 in a Reshape's shape means "as before"
        return False
    order = [axis for axis in node.attributes.get_ints("perm", list(reversed(range(len(before))))) if before[axis] > 1]
    if order != sorted(order):
        return False
    replace(graph, node, reshape(graph, node, node.inputs[0], after, "shaped"))
    return True


def _sink(graph: ir.Graph, node: ir.Node) -> bool:
    """A node along the last axis that reads a Reshape, which leaves that axis alone, is computed before the Reshape."""
    if node.graph is None or node.op_type not in ("Softmax", "Add", "Mul") or node.domain not in ("", "ai.onnx"):
        return False
    place = next((i for i, value in enumerate(node.inputs) if made_by(value, "Reshape") is not None), None)
    if place is None or node.outputs[0].is_graph_output():
        return False
    view = node.inputs[place]
    producer = made_by(view, "Reshape")
    if view is None or producer is None or len(view.uses()) > 1 or view.is_graph_output():
        return False
    source = producer.inputs[0]
    inner, outer = sizes(source), sizes(view)
    if not inner or not outer or sizes(node.outputs[0]) != outer or inner[-1] != outer[-1]:
        return False
    if node.op_type == "Softmax":
        if node.attributes.get_int("axis", -1) not in (-1, len(outer) - 1):
            return False
        moved = ir.node("Softmax", [source], attributes={"axis": -1})
    else:
        other = sizes(node.inputs[1 - place])
        if not other or len(other) > len(inner) or any(d != 1 for d in other[:-1]):
            return False
        moved = ir.node(node.op_type, [source if i == place else value for i, value in enumerate(node.inputs)])
    replace(graph, node, reshape(graph, node, add(graph, node, moved, inner, "before"), outer, "shaped"))
    return True


def _scale(graph: ir.Graph, node: ir.Node) -> bool:
    """A product with one number is taken after the Reshape: next to the MatMul, which onnxruntime then scales."""
    if node.graph is None or node.op_type != "Reshape" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return False
    product, shape = made_by(node.inputs[0], "Mul"), sizes(node.outputs[0])
    if product is None or shape is None or len(product.outputs[0].uses()) != 1 or product.outputs[0].is_graph_output():
        return False
    place = next((i for i, value in enumerate(product.inputs) if value is not None and sizes(value) == ()), None)
    if place is None:
        return False
    view = reshape(graph, node, product.inputs[1 - place], shape, "shaped")
    factors = [product.inputs[place] if i == place else view for i in (0, 1)]
    replace(graph, node, add(graph, node, ir.node("Mul", factors), shape, "scaled"))
    graph.remove(product, safe=True)
    return True


def _merge(graph: ir.Graph, node: ir.Node) -> bool:
    """A Reshape of a Reshape is the second alone; one that changes nothing goes away."""
    if node.graph is None or node.op_type != "Reshape" or node.domain not in ("", "ai.onnx"):
        return False
    shape, source = sizes(node.outputs[0]), node.inputs[0]
    if shape is None or source is None or 0 in shape:
        return False
    own = source.producer() is not None and not source.is_graph_output()
    if sizes(source) == shape and (own or not node.outputs[0].is_graph_output()):
        replace(graph, node, source)
        return True
    inner = made_by(source, "Reshape")
    if inner is None:
        return False
    replace(graph, node, reshape(graph, node, inner.inputs[0], shape, "shaped"))
    return True
