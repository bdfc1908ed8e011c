"""What passes that rewrite a graph share: reading shapes, following a value back, adding a node, putting a value in another's place."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["add", "constant", "made_by", "replace", "reshape", "shared_heads", "sizes"]


def sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape as numbers; None where it is open."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(d) for d in value.shape.numpy())


def made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that makes a value, if it is of that standard operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator and node.domain in ("", "ai.onnx") else None


def shared_heads(value: ir.Value | None) -> ir.Value | None:
    """The `[b, g, s, d]` that was expanded to `[b, h, s, d]`; None where nothing was."""
    found = sizes(value)
    for operator in ("Reshape", "Expand", "Unsqueeze"):
        node = made_by(value, operator)
        if node is None:
            return None
        value = node.inputs[0]
    source = sizes(value)
    if found is None or source is None or len(found) != 4 or len(source) != 4:
        return None
    same = found[0] == source[0] and found[2:] == source[2:] and found[1] % source[1] == 0 and found[1] != source[1]
    return value if same else None


def add(graph: ir.Graph, before: ir.Node, node: ir.Node, shape: tuple[int, ...], suffix: str) -> ir.Value:
    """Put a node with one output of that shape before another; dtype and name come from the other's output."""
    old, out = before.outputs[0], node.outputs[0]
    out.shape, out.type, out.name = ir.Shape(shape), old.type, f"{old.name}.{suffix}"
    graph.insert_before(before, node)
    return out


def reshape(graph: ir.Graph, before: ir.Node, value: ir.Value | None, shape: tuple[int, ...], suffix: str) -> ir.Value:
    """Put a Reshape of `value` before a node."""
    wanted = constant(graph, f"sizes_{'x'.join(map(str, shape))}", shape)
    return add(graph, before, ir.node("Reshape", [value, wanted]), shape, suffix)


def replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let every reader of a node's one output read `value`, which takes over its name where the graph returns it; remove the node."""
    old = node.outputs[0]
    name, returned = old.name, old.is_graph_output()
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if returned:
        value.name = name


def constant(graph: ir.Graph, name: str, array: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> ir.Value:
    """The initializer of that name, made at the first call; equal names must mean equal numbers."""
    if name not in graph.initializers:
        tensor = ir.Tensor(np.ascontiguousarray(np.asarray(array, dtype).reshape(np.shape(array))), name=name)
        shape = ir.Shape(tensor.shape.numpy())
        graph.initializers[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    return graph.initializers[name]
