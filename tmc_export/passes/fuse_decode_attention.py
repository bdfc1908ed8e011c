"""The attention of a decode step as onnxruntime's one operator for it.

Before, per layer: the joined projection's `Split → q, k, v`, Reshapes, two rotary embeddings, two `ScatterND` into the slots, and
`Softmax(q·Kᵀ·scale + mask)·V`, some twenty nodes that cost more to start than to compute.
After: `com.microsoft::GroupQueryAttention(qkv, K slots, V slots)`, which does the same. Slots of int8 codes (`quantize_slots`)
stay codes: the operator rounds the new row, attends with it as it is stored, and widens codes as it multiplies. It takes a scale per KV
head and channel, so that each is given its head's.

Only for bundles that onnxruntime runs: TensorRT knows no such operator, and the graphs of `engines/` never have it. What it takes for
granted holds in a decode step without sliding windows: the slots are filled in order and every filled one is seen. It rotates with row
`seqlens_k` of a table; positions have gaps where tokens were dropped, so every row of the table is that of the token's own position. Both
halves of a cosine or sine are taken to be equal, as they are for a token whose rotary axes agree, which a generated token's do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.export.lazy_tensors import KeyedTensor, key_of
from tmc_export.passes._rewrite import constant, made_by, replace, sizes

__all__ = ["FUSED", "FuseDecodeAttentionPass"]

_DOMAIN, _OPERATOR = "com.microsoft", "GroupQueryAttention"
FUSED = f"{_DOMAIN}::{_OPERATOR}"
"""The operator that this pass puts in."""


@dataclass(frozen=True)
class _Rotation:
    """`Add(Mul(x, cos), Mul(Concat(Slice(x), Slice(x)), sin))`, x a Reshape of one output of a Split.

    Attributes:
        shaped: the Reshape, to `[b, heads, 1, d]`.
        halves: the two Slices, in the order of the Concat.
        factors: cos and sin, `[b, 1, 1, d]`.
    """

    shaped: ir.Node
    halves: tuple[ir.Node, ir.Node]
    factors: tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class _Filled:
    """A tensor of slots that gets a row.

    Attributes:
        node: the ScatterND.
        new: the row, before it is rounded to codes.
        scales: of the codes, `[g]`; None where the slots hold the row as it is.
    """

    node: ir.Node
    new: ir.Value | None
    scales: ir.Value | None = None


@dataclass(frozen=True)
class _Attention:
    """What one layer's attention reads.

    Attributes:
        end: the Reshape to `[1, 1, h·d]` that returns it.
        packed: `[1, 1, (h + 2g)·d]`, the joined projection.
        key, value: what fills the slots `[1, g, C, d]`.
        rotation: of the query; the key's has the same factors.
        scale: of the scores.
    """

    end: ir.Node
    packed: ir.Value
    key: _Filled
    value: _Filled
    rotation: _Rotation
    scale: float


class FuseDecodeAttentionPass(ir.passes.InPlacePass):
    """Replace the attention of every layer whose query, key and value come from one projection; of one sequence, in float32."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any attention was replaced."""
        found = [a for node in model.graph if node.op_type == "Softmax" and (a := _attention(node)) is not None]
        if not found:
            return ir.passes.PassResult(model, False)
        tables = _Tables(model.graph)
        for attention in found:
            _fuse(model.graph, attention, tables)
        model.opset_imports[_DOMAIN] = 1
        return ir.passes.PassResult(model, True)


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _number(value: ir.Value | None) -> float | None:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return float(tensor.numpy()) if tensor is not None and sizes(value) == () else None


def _query(value: ir.Value | None) -> tuple[_Rotation, float] | None:
    """The rotation behind a product's rows, and the numbers it is multiplied with on the way."""
    scale = 1.0
    for _ in range(4):
        if (view := made_by(value, "Reshape")) is not None:
            value = view.inputs[0]
        elif (product := made_by(value, "Mul")) is not None and (factor := _number(product.inputs[1])) is not None:
            value, scale = product.inputs[0], scale * factor
    end = made_by(value, "Add")
    rotation = _rotation(end) if end is not None else None
    return None if rotation is None else (rotation, scale)


def _rotation(node: ir.Node) -> _Rotation | None:
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
            return _Rotation(shaped, (first, second), (cos, sin))
    return None


def _attention(softmax: ir.Node) -> _Attention | None:
    total = made_by(softmax.inputs[0], "Add")
    scores = next((n for v in total.inputs if (n := made_by(v, "MatMul")) is not None), None) if total is not None else None
    mixed = _only_reader(softmax.outputs[0])
    if scores is None or mixed is None or mixed.op_type != "MatMul":
        return None
    turned, end = made_by(scores.inputs[1], "Transpose"), _only_reader(mixed.outputs[0])
    key = _filled(turned.inputs[0]) if turned is not None and turned.attributes.get_ints("perm", []) == (0, 1, 3, 2) else None
    value, query = _filled(mixed.inputs[1]), _query(scores.inputs[0])
    if key is None or value is None or query is None or end is None or end.op_type != "Reshape":
        return None
    rotated = made_by(key.new, "Add")
    other = _rotation(rotated) if rotated is not None else None
    heads = made_by(value.new, "Reshape")
    if other is None or heads is None or other.factors != query[0].factors or (key.scales is None) != (value.scales is None):
        return None
    parts = [query[0].shaped.inputs[0], other.shaped.inputs[0], heads.inputs[0]]
    split = made_by(parts[0], "Split")
    if split is None or list(split.outputs) != parts or split.inputs[0] is None or split.inputs[0].dtype is not ir.DataType.FLOAT:
        return None
    found = _Attention(end, split.inputs[0], key, value, *query)
    return found if _fits(found) else None


def _filled(value: ir.Value | None) -> _Filled | None:
    """The ScatterND behind slots as attention reads them, directly or widened from codes."""
    widened = made_by(value, "DequantizeLinear")
    node = made_by(value if widened is None else widened.inputs[0], "ScatterND")
    if node is None or widened is None:
        return None if node is None else _Filled(node, node.inputs[2])
    rounded, scales = made_by(node.inputs[2], "QuantizeLinear"), widened.inputs[1]
    if rounded is None or scales is None or rounded.inputs[1] is not scales or not scales.is_initializer():
        return None
    return _Filled(node, rounded.inputs[0], scales)


def _fits(found: _Attention) -> bool:
    """One sequence, whole heads rotated by halves, the high half first, and the sine with the sign that `SignRotationPass` gave it."""
    packed, out, slots = sizes(found.packed), sizes(found.end.outputs[0]), sizes(found.key.node.outputs[0])
    if packed is None or out is None or slots is None or packed[:-1] != (1, 1) or out[:-1] != (1, 1) or slots[-1] % 16:
        return False
    starts = [half.inputs[1] for half in found.rotation.halves]
    numbers = [int(v.const_value.numpy().reshape(-1)[0]) if v is not None and v.const_value is not None else -1 for v in starts]
    signed = made_by(found.rotation.factors[1], "Mul")
    signs = signed.inputs[1].const_value if signed is not None and signed.inputs[1] is not None else None
    half = slots[-1] // 2
    return numbers == [half, 0] and signs is not None and signs.numpy().tolist() == [-1.0] * half + [1.0] * half


class _Tables:
    """Rotary tables `[C, d / 2]` and the count of filled slots, made once at the head of the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._made: dict[tuple[ir.Value, int], ir.Value] = {}
        valid = next(value for value in graph.inputs if value.name == "past_valid")
        flags = self._node(None, "Cast", [valid], sizes(valid) or (), ir.DataType.INT32, "filled.valid", to=int(ir.DataType.INT32))
        axis = constant(self.graph, "filled.axis", [1])
        count = self._node(flags, "ReduceSum", [flags.outputs[0], axis], (1,), ir.DataType.INT32, "filled", keepdims=0)
        self.filled = count.outputs[0]

    def table(self, factor: ir.Value, slots: int) -> ir.Value:
        """The second half of a factor `[1, 1, 1, d]` in every one of `slots` rows."""
        if (factor, slots) not in self._made:
            width, dtype, name = (sizes(factor) or (0,))[-1], factor.dtype or ir.DataType.FLOAT, f"{factor.name}.table"
            ends = [constant(self.graph, f"{name}.{word}", [n]) for word, n in (("from", width // 2), ("to", width), ("axis", 3))]
            half = self._node(factor.producer(), "Slice", [factor, *ends], (1, 1, 1, width // 2), dtype, f"{name}.half")
            flat = constant(self.graph, f"{name}.flat", [1, width // 2])
            row = self._node(half, "Reshape", [half.outputs[0], flat], (1, width // 2), dtype, f"{name}.row")
            shape = constant(self.graph, f"{name}.shape", [slots, width // 2])
            made = self._node(row, "Expand", [row.outputs[0], shape], (slots, width // 2), dtype, name)
            self._made[factor, slots] = made.outputs[0]
        return self._made[factor, slots]

    def _node(
        self,
        after: ir.Node | None,
        operator: str,
        inputs: list[ir.Value],
        shape: tuple[int, ...],
        dtype: ir.DataType,
        name: str,
        **more: int,
    ) -> ir.Node:
        node = ir.node(operator, inputs, attributes=more)
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, ir.Shape(shape), ir.TensorType(dtype)
        if after is None:
            self.graph.insert_before(next(iter(self.graph)), node)
        else:
            self.graph.insert_after(after, node)
        return node


def _fuse(graph: ir.Graph, found: _Attention, tables: _Tables) -> None:
    slots = sizes(found.key.node.outputs[0]) or ()
    cos, signed = found.rotation.factors
    signing = made_by(signed, "Mul")
    sine = signing.inputs[0] if signing is not None else None
    heads = (sizes(found.end.outputs[0]) or (0,))[-1] // slots[-1]
    node = ir.Node(
        _DOMAIN,
        _OPERATOR,
        [
            found.packed, None, None, found.key.node.inputs[0], found.value.node.inputs[0], tables.filled,
            constant(graph, "slots.count", slots[2], np.int32),
            tables.table(cos, slots[2]), tables.table(signed if sine is None else sine, slots[2]), *_scales(graph, found, slots),
        ],
        [
            ir.AttrInt64("num_heads", heads), ir.AttrInt64("kv_num_heads", slots[1]), ir.AttrFloat32("scale", found.scale),
            ir.AttrInt64("do_rotary", 1), ir.AttrInt64("rotary_interleaved", 0), *_told(found),
        ],
        num_outputs=3,
    )  # fmt: skip
    graph.insert_before(found.end, node)
    _widen_bias(graph, found.packed)
    for out, old in zip(node.outputs, (found.end.outputs[0], found.key.node.outputs[0], found.value.node.outputs[0]), strict=True):
        out.name, out.shape, out.type = f"{old.name}.fused", old.shape, old.type
    replace(graph, found.end, node.outputs[0])
    for old_node, out in ((found.key.node, node.outputs[1]), (found.value.node, node.outputs[2])):
        name = old_node.outputs[0].name
        old_node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
        old_node.outputs[0].name, out.name = f"{name}.scattered", name


def _told(found: _Attention) -> list[ir.Attr]:
    """Attributes that tell the operator of int8 slots."""
    if found.key.scales is None:
        return []
    return [*(ir.AttrString(f"{kind}_quant_type", "PER_CHANNEL") for kind in "kv"), ir.AttrInt64("kv_cache_bit_width", 8)]


def _scales(graph: ir.Graph, found: _Attention, slots: tuple[int, ...]) -> list[ir.Value | None]:
    """The inputs behind the rotary tables, up to the scales of keys and values, each `[1, g, 1, d]`; none where slots hold no codes."""
    inputs: list[ir.Value | None] = []
    for filled in (found.key, found.value):
        if filled.scales is not None and filled.scales.const_value is not None:
            each = filled.scales.const_value.numpy().reshape(1, -1, 1, 1)
            wide = np.broadcast_to(each, (1, slots[1], 1, slots[3]))
            inputs.append(constant(graph, f"{filled.scales.name}.channels", wide, np.float32))
    return [None, None, None, *inputs] if inputs else []  # positions, bias and sinks lie between


def _widen_bias(graph: ir.Graph, packed: ir.Value) -> None:
    """Give the projection's bias the rank of what it is added to: one of rank 1 makes onnxruntime flatten the product and shape it back."""
    total = made_by(packed, "Add")
    bias = total.inputs[1] if total is not None else None
    if total is None or bias is None or bias.const_value is None or len(sizes(bias) or ()) != 1:
        return
    wide, name = (1, 1, *(sizes(bias) or ())), f"{bias.name}.wide"
    source = bias.const_value
    key, dtype = key_of(source), source.dtype  # the key of the bias: the other phases read the same bytes
    tensor = KeyedTensor(key, lambda: ir.Tensor(source.numpy().reshape(wide), dtype=dtype, name=name), dtype, wide, name)
    graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(wide), type=ir.TensorType(tensor.dtype), const_value=tensor)
    total.replace_input_with(1, graph.initializers[name])
    if not bias.uses():
        del graph.initializers[bias.name or ""]
