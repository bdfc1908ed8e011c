"""Read the input of an attention once: its query, key and value projections become one product.

Before: `Add(MatMul(x, Wq), bq)`, `Add(MatMul(x, Wk), bk)`, `Add(MatMul(x, Wv), bv)`.
After: `Split(Add(MatMul(x, [Wq|Wk|Wv]), [bq|bk|bv]))`. A weight may be stored in another type, `Cast(W)` or `DequantizeLinear(Q, s)`:
codes and scales are joined alike, every column keeps its own. Scales may be stored in another type again, `DequantizeLinear(S, g)`, where
the three have one `g`. The bytes are joined while they are streamed to disk.

Three products or more of one input are joined. Two (gate and up of a feed-forward) are not: in a prompt, splitting their wide result
costs more than the second product saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.export.lazy_tensors import KeyedTensor, key_of
from tmc_export.passes._rewrite import constant, sizes

__all__ = ["JoinProjectionsPass"]

_FROM = 3
"""Products of one input that are worth joining."""
_WIDENING = ("Cast", "DequantizeLinear")


@dataclass(frozen=True)
class _Product:
    """`MatMul(x, weight)`, perhaps with its bias.

    Attributes:
        node: the MatMul.
        widen: the node between the stored tensors and the product, if any.
        scales: the node that widens the scales, if any; its second input is common to all products.
        stored: weight, or codes and scales; the last axis of each counts the product's columns.
        columns: of the weight.
        bias: the Add that alone reads the product, and what it adds.
    """

    node: ir.Node
    widen: ir.Node | None
    scales: ir.Node | None
    stored: tuple[ir.Value, ...]
    columns: int
    bias: tuple[ir.Node, ir.Value] | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal for two products to become one."""
        how = [_form(node) for node in (self.widen, self.scales)]
        tensors = [(_tensor(v).dtype, (sizes(v) or ())[:-1]) for v in self.stored]
        return (*how, self.common, *tensors, self.bias is not None)

    @property
    def common(self) -> ir.Value | None:
        """What scales are multiplied with."""
        return None if self.scales is None else self.scales.inputs[1]

    @property
    def end(self) -> ir.Node:
        return self.node if self.bias is None else self.bias[0]


class JoinProjectionsPass(ir.passes.InPlacePass):
    """Join the products of one value with three or more weight matrices."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any products were joined."""
        groups: dict[tuple[object, ...], list[_Product]] = {}
        for node in model.graph:
            product = _product(node)
            if product is not None:
                groups.setdefault((node.inputs[0], product.kind), []).append(product)
        found = [group for group in groups.values() if len(group) >= _FROM]
        for group in found:
            _join(model.graph, group)
        return ir.passes.PassResult(model, bool(found))


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"'{value.name}' is no initializer")
    return value.const_value


def _form(node: ir.Node | None) -> tuple[str, ...] | None:
    """A widening's operator and attributes."""
    return None if node is None else (node.op_type, *sorted(f"{n}={a.value}" for n, a in node.attributes.items()))


def _widening(value: ir.Value | None) -> ir.Node | None:
    """The node that widens a value from a stored type, of which the value is all that is read."""
    node = value.producer() if value is not None and len(value.uses()) == 1 else None
    return node if node is not None and node.op_type in _WIDENING and node.domain in ("", "ai.onnx") else None


def _stored(value: ir.Value | None, rank: int | None = None) -> bool:
    """Whether a value is an initializer (of that rank) that one node reads."""
    if value is None or not value.is_initializer() or value.const_value is None or value.is_graph_output() or len(value.uses()) != 1:
        return False
    return rank is None or len(value.const_value.shape) == rank


def _product(node: ir.Node) -> _Product | None:
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return None
    weight = node.inputs[1]
    if weight is None or len(weight.uses()) != 1:
        return None
    widen, scales = _widening(weight), None
    if widen is None:
        stored: tuple[ir.Value | None, ...] = (weight,) if weight.producer() is None else ()
    else:
        stored = tuple(widen.inputs)
        scales = _widening(stored[1]) if len(stored) == 2 else None
        if scales is not None and len(scales.inputs) == 2:
            stored = (stored[0], scales.inputs[0])
    if not all(_stored(v) for v in stored):
        return None
    found = tuple(v for v in stored if v is not None)
    shapes = [sizes(value) or (0,) for value in found]
    if len({shape[-1] for shape in shapes}) != 1 or len(shapes[0]) != 2:
        return None
    return _Product(node, widen, scales, found, shapes[0][-1], _bias(node, shapes[0][-1]))


def _bias(node: ir.Node, columns: int) -> tuple[ir.Node, ir.Value] | None:
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or uses[0].node.outputs[0].is_graph_output():
        return None
    value = uses[0].node.inputs[1 - uses[0].idx]
    return (uses[0].node, value) if value is not None and _stored(value, 1) and sizes(value) == (columns,) else None


def _join(graph: ir.Graph, products: Sequence[_Product]) -> None:
    first = products[0]
    stored = [_beside(graph, [p.stored[i] for p in products]) for i in range(len(first.stored))]
    columns, name = [p.columns for p in products], stored[0].name
    made: list[ir.Node] = []
    weight = stored[0]
    if first.widen is not None:
        inputs = stored
        if first.scales is not None:
            made.append(ir.node(first.scales.op_type, [stored[1], first.common], attributes=dict(first.scales.attributes)))
            _like(made[-1].outputs[0], first.scales.outputs[0], sum(columns), f"{name}.scales")
            inputs = [stored[0], made[-1].outputs[0]]
        made.append(ir.node(first.widen.op_type, inputs, attributes=dict(first.widen.attributes)))
        weight = made[-1].outputs[0]
        weight.name, weight.type = f"{name}.widened", _value(first.node.inputs[1]).type
        weight.shape = ir.Shape((*(sizes(stored[0]) or ())[:-1], sum(columns)))
    made.append(ir.node("MatMul", [first.node.inputs[0], weight]))
    _like(made[-1].outputs[0], first.end.outputs[0], sum(columns), f"{name}.product")
    biases = [p.bias[1] for p in products if p.bias is not None]
    if biases:
        made.append(ir.node("Add", [made[-1].outputs[0], _beside(graph, biases)]))
        _like(made[-1].outputs[0], first.end.outputs[0], sum(columns), f"{name}.sum")
    split = ir.node(
        "Split",
        [made[-1].outputs[0], constant(graph, f"split_{'_'.join(map(str, columns))}", columns)],
        attributes={"axis": -1},
        num_outputs=len(columns),
    )
    graph.insert_before(_earliest(graph, products), [*made, split])
    for product, part in zip(products, split.outputs, strict=True):
        old = product.end.outputs[0]
        _like(part, old, product.columns, old.name)
        old.replace_all_uses_with(part)
        graph.remove([product.node] if product.bias is None else [product.end, product.node], safe=True)
        graph.remove([node for node in (product.widen, product.scales) if node is not None], safe=True)
    for value in [*(v for p in products for v in p.stored), *biases]:
        del graph.initializers[value.name or ""]


def _earliest(graph: ir.Graph, products: Sequence[_Product]) -> ir.Node:
    nodes = {p.node for p in products}
    return next(node for node in graph if node in nodes)


def _value(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise ValueError("a product without a weight")
    return value


def _like(value: ir.Value, like: ir.Value, columns: int, name: str | None) -> None:
    value.name, value.type = name, like.type
    if like.shape is not None:
        value.shape = ir.Shape([*list(like.shape)[:-1], columns])


def _beside(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Value:
    """The initializer that holds several side by side, made when it is written."""
    tensors = [_tensor(value) for value in values]
    name = "+".join([values[0].name or "", *((v.name or "").rsplit("layers.", 1)[-1] for v in values[1:])])
    lead = (sizes(values[0]) or ())[:-1]
    shape = (*lead, sum((sizes(value) or ())[-1] for value in values))
    dtype = tensors[0].dtype

    def load() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([t.numpy() for t in tensors], axis=-1), dtype=dtype, name=name)

    tensor = KeyedTensor(f"join({'; '.join(map(key_of, tensors))})", load, dtype, shape, name)
    joined = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(joined)
    return joined
