"""The attention of a decode step, found in a graph: what the passes that write it otherwise for onnxruntime read.

Per layer: the joined projection's `Split → q, k, v`, Reshapes, two rotary embeddings, two `ScatterND` into the slots, and
`Softmax(q·Kᵀ·scale + mask)·V`, some twenty nodes. What is taken for granted holds in a decode step without sliding windows: the slots are
filled in order and every filled one is seen, and both halves of a cosine or sine are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from tmc_export.passes._rewrite import constant, made_by, sizes

__all__ = ["DecodeAttention", "Factors", "Filled", "Rotation", "decode_attention"]


@dataclass(frozen=True)
class Rotation:
    """`Add(Mul(x, cos), Mul(Concat(Slice(x), Slice(x)), sin))`, x a Reshape of one output of a Split.

    Attributes:
        end: the Add, `[b, heads, 1, d]`.
        shaped: the Reshape, to `[b, heads, 1, d]`.
        halves: the two Slices, in the order of the Concat.
        factors: cos and sin, `[b, 1, 1, d]`.
    """

    end: ir.Node
    shaped: ir.Node
    halves: tuple[ir.Node, ir.Node]
    factors: tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class Filled:
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
class DecodeAttention:
    """What one layer's attention reads.

    Attributes:
        mask: the Add of what hides slots to the scores, which are its input `scores`.
        scores: 0 or 1.
        end: the Reshape to `[1, 1, h·d]` that returns it.
        split: makes query, key and value of `packed`.
        packed: `[1, 1, (h + 2g)·d]`, the joined projection.
        key, value: what fills the slots `[1, g, C, d]`.
        rotation, key_rotation: of the query and of the key, by the same factors.
        scale: of the scores.
    """

    mask: ir.Node
    scores: int
    end: ir.Node
    split: ir.Node
    packed: ir.Value
    key: Filled
    value: Filled
    rotation: Rotation
    key_rotation: Rotation
    scale: float

    @property
    def slots(self) -> tuple[int, int, int, int]:
        """Shape of the keys' slots: 1, g key-value heads, C slots, d channels."""
        one, heads, count, width = sizes(self.key.node.outputs[0]) or (1, 1, 1, 1)
        return one, heads, count, width

    @property
    def heads(self) -> int:
        """Query heads."""
        return (sizes(self.end.outputs[0]) or (0,))[-1] // self.slots[-1]

    @property
    def factors(self) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine `[1, 1, 1, d]`, the sine without the signs that `SignRotationPass` gave it."""
        cos, signed = self.rotation.factors
        signing = made_by(signed, "Mul")
        return cos, signed if signing is None or signing.inputs[0] is None else signing.inputs[0]


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _number(value: ir.Value | None) -> float | None:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return float(tensor.numpy()) if tensor is not None and sizes(value) == () else None


def _query(value: ir.Value | None) -> tuple[Rotation, float] | None:
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


def _rotation(node: ir.Node) -> Rotation | None:
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


def decode_attention(softmax: ir.Node) -> DecodeAttention | None:
    """What a Softmax is the heart of: the attention of one sequence's one token, in float32; None where it is something else."""
    if softmax.op_type != "Softmax":
        return None
    total, mixed = made_by(softmax.inputs[0], "Add"), _only_reader(softmax.outputs[0])
    place, scores = (
        next(((i, n) for i, v in enumerate(total.inputs) if (n := made_by(v, "MatMul")) is not None), (0, None)) if total else (0, None)
    )
    if total is None or scores is None or mixed is None or mixed.op_type != "MatMul":
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
    rotation, scale = query
    found = DecodeAttention(total, place, end, split, split.inputs[0], key, value, rotation, other, scale)
    return found if _fits(found) else None


def _filled(value: ir.Value | None) -> Filled | None:
    """The ScatterND behind slots as attention reads them, directly or widened from codes."""
    widened = made_by(value, "DequantizeLinear")
    node = made_by(value if widened is None else widened.inputs[0], "ScatterND")
    if node is None or widened is None:
        return None if node is None else Filled(node, node.inputs[2])
    rounded, scales = made_by(node.inputs[2], "QuantizeLinear"), widened.inputs[1]
    if rounded is None or scales is None or rounded.inputs[1] is not scales or not scales.is_initializer():
        return None
    return Filled(node, rounded.inputs[0], scales)


def _fits(found: DecodeAttention) -> bool:
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


def _of_halves(factor: ir.Value) -> tuple[str, ir.Value] | None:
    """Cos or Sin, and the `[…, d / 2]` that it is taken of twice, side by side, where axes of one are all that is added behind it."""
    value: ir.Value | None = factor
    while (node := made_by(value, "Unsqueeze") or made_by(value, "Reshape")) is not None:
        value = node.inputs[0]
    turn = made_by(value, "Cos") or made_by(value, "Sin")
    twice = made_by(turn.inputs[0], "Concat") if turn is not None else None
    if turn is None or twice is None or len(twice.inputs) != 2 or twice.inputs[0] is not twice.inputs[1] or twice.inputs[0] is None:
        return None
    halves, wide = sizes(twice.inputs[0]), (sizes(factor) or (0,))[-1]
    alike = halves is not None and set(halves[:-1]) <= {1} and 2 * halves[-1] == wide and sizes(value) == (*halves[:-1], wide)
    return (turn.op_type, twice.inputs[0]) if alike else None


class Factors:
    """What rotates the token of a decode step, made once for all layers."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._rows: dict[ir.Value, ir.Node] = {}
        self._angles: dict[ir.Value, ir.Node] = {}

    def row(self, factor: ir.Value) -> ir.Node:
        """The node that makes one half of a factor `[1, 1, 1, d]`, as `[1, d / 2]`."""
        if factor not in self._rows:
            width, name = (sizes(factor) or (0,))[-1] // 2, f"{factor.name}.table"
            flat = constant(self.graph, f"sizes_1x{width}", [1, width])
            if (found := _of_halves(factor)) is not None:
                turn, angles = found
                if angles not in self._angles:
                    self._angles[angles] = self.node(
                        angles.producer(), "Reshape", [angles, flat], (1, width), factor.dtype, f"{angles.name}.row"
                    )
                before = self._angles[angles]
                self._rows[factor] = self.node(before, turn, before.outputs, (1, width), factor.dtype, f"{name}.row")
            else:
                ends = [constant(self.graph, f"{name}.{word}", [n]) for word, n in (("from", width), ("to", 2 * width), ("axis", 3))]
                half = self.node(factor.producer(), "Slice", [factor, *ends], (1, 1, 1, width), factor.dtype, f"{name}.half")
                self._rows[factor] = self.node(half, "Reshape", [half.outputs[0], flat], (1, width), factor.dtype, f"{name}.row")
        return self._rows[factor]

    def node(
        self,
        after: ir.Node | None,
        operator: str,
        inputs: Sequence[ir.Value | None],
        shape: tuple[int, ...],
        dtype: ir.DataType | None,
        name: str,
        **more: int,
    ) -> ir.Node:
        """Put a node with one output of that shape and type behind another, or first."""
        node = ir.node(operator, inputs, attributes=more)
        node.outputs[0].name, node.outputs[0].shape = name, ir.Shape(shape)
        node.outputs[0].type = ir.TensorType(dtype or ir.DataType.FLOAT)
        if after is None:
            self.graph.insert_before(next(iter(self.graph)), node)
        else:
            self.graph.insert_after(after, node)
        return node
