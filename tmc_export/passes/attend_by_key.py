"""Attention of a decode step with the query heads of a key as rows: the standard operator, behind onnxruntime's rotation of all heads.

Before, per layer: what `_decode_attention` finds. After: the heads `[h + 2g, 1, d]`, one `com.microsoft::RotaryEmbedding` of all of them,
the values' by the angle 0, `Split → q, k, v`, and `Attention` (opset 23) of `[1, g, h / g, d]` on g heads of slots, with a mask made of the
first free slot alone. With h heads of one row each it would read a key once per query head.

For attention that `fuse_decode_attention` would make slower. `GroupQueryAttention` multiplies every query head by itself with the keys that
are filled; here the query heads of a KV head are rows of one product with all slots. So this form is for many heads that share a key
(`LEAST_SHARING`), in many slots (`LEAST_SLOTS`) that pictures fill for the most part (`LEAST_FILLED`). `benchmarks/decode_attention.py` has
both forms beside each other.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.passes._decode_attention import DecodeAttention, Factors, decode_attention
from tmc_export.passes._rewrite import constant, made_by, replace, reshape, sizes

__all__ = ["ROTATED", "AttendByKeyPass"]

_DOMAIN, _OPERATOR = "com.microsoft", "RotaryEmbedding"
ROTATED = f"{_DOMAIN}::{_OPERATOR}"
"""The operator of onnxruntime that this pass puts in."""

_ATTENTION, _OPSET, _IR_VERSION = "Attention", 23, 11
"""The standard one, and the first versions with it."""

_ROUNDING = "QuantizeLinear"
"""onnxruntime 1.23 has none of that opset: graphs with it keep products and a Softmax."""

_HIDDEN = -3.0e4
"""Added to the scores of slots that hold nothing, as in all other graphs (`surgery.attention.MASKED`)."""

LEAST_SHARING = 6
"""Query heads per KV head."""

LEAST_SLOTS = 704
"""The fewest with which whole steps were timed (`benchmarks/genai_compare.py`); with fewer there is less to gain, and as much to start."""

LEAST_FILLED = Fraction(2, 3)
"""Of the slots, by the visual tokens of a conversation with all its pictures: with few of them most of the work is wasted."""


class AttendByKeyPass(ir.passes.InPlacePass):
    """Rewrite the attention of every layer for which it is the faster form; of one sequence, in float32, slots without codes.

    Args:
        visual: visual tokens of a conversation with all its pictures.
        sharing: query heads per KV head from which it is taken to be faster.
        filled: share of the slots that they must fill for it.
        slots: from which it is; `LEAST_SLOTS` by default.
    """

    def __init__(self, visual: int, sharing: int = LEAST_SHARING, filled: Fraction = LEAST_FILLED, slots: int | None = None) -> None:
        super().__init__()
        self.visual, self.sharing, self.filled, self.slots = visual, sharing, filled, slots

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any attention was rewritten."""
        found = [a for node in model.graph if (a := decode_attention(node)) is not None and self._pays(a)]
        made = _Made(model.graph)
        whole = not any(node.op_type == _ROUNDING for node in model.graph)
        for attention in found:
            _rewrite(model.graph, attention, made, whole)
        if found:
            model.opset_imports[_DOMAIN] = 1
        if found and whole:
            model.opset_imports[""], model.ir_version = max(_OPSET, model.opset_imports[""]), max(_IR_VERSION, model.ir_version)
        return ir.passes.PassResult(model, bool(found))

    def _pays(self, found: DecodeAttention) -> bool:
        _, heads, slots, _ = found.slots
        return (
            found.key.scales is None
            and _free(found) is not None
            and slots >= (LEAST_SLOTS if self.slots is None else self.slots)
            and found.heads >= self.sharing * heads
            and self.visual >= self.filled * slots
        )


class _Made:
    """What all layers read, made for the first one."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self._factors = graph, Factors(graph)
        self._tables: dict[tuple[ir.Value, float], ir.Value] = {}
        self._masks: dict[tuple[int, int], ir.Value] = {}
        self._indices: dict[ir.Value | None, ir.Value] = {}

    def turns(self, found: DecodeAttention) -> list[ir.Value]:
        """Cosines and sines `[2, d / 2]`: row 0 of the token's position, row 1 of the angle 0."""
        return [self._table(factor, still) for factor, still in zip(found.factors, (1.0, 0.0), strict=True)]

    def _table(self, factor: ir.Value, still: float) -> ir.Value:
        if (factor, still) not in self._tables:
            row = self._factors.row(factor)
            wide = (sizes(row.outputs[0]) or (1, 1))[1]
            end = constant(self.graph, f"rotary.still_{still:g}x{wide}", np.full((1, wide), still), np.float32)
            node = self._factors.node(row, "Concat", [row.outputs[0], end], (2, wide), ir.DataType.FLOAT, f"{factor.name}.turns", axis=0)
            self._tables[factor, still] = node.outputs[0]
        return self._tables[factor, still]

    def index(self, found: DecodeAttention, index: ir.Value | None, heads: int) -> ir.Value:
        """int64 `[g, 1, 3]`: the `index` of `AppendInPlacePass`, for new rows without an axis for the one sequence."""
        if index not in self._indices:
            rows = reshape(self.graph, found.split, index, (heads, 1, 3), "index")
            rows.type = ir.TensorType(ir.DataType.INT64)
            self._indices[index] = rows
        return self._indices[index]

    def mask(self, found: DecodeAttention, slots: int, rows: int) -> ir.Value:
        """float `[rows, C]`: 0 up to the first free slot, which the token itself fills, `_HIDDEN` behind it."""
        if (slots, rows) not in self._masks:
            name = f"slots.seen_{rows}x{slots}"
            places = constant(self.graph, f"slots.places_{rows}x{slots}", np.tile(np.arange(slots), (rows, 1)))
            up_to = ir.node("LessOrEqual", [places, _free(found)])
            _place(self.graph, found.split, up_to, (rows, slots), f"{name}.flags", ir.DataType.BOOL)
            ends = [constant(self.graph, f"seen.{word}", number, np.float32) for word, number in (("yes", 0), ("no", _HIDDEN))]
            node = ir.node("Where", [up_to.outputs[0], *ends])
            _place(self.graph, found.split, node, (rows, slots), name)
            self._masks[slots, rows] = node.outputs[0]
        return self._masks[slots, rows]


def _rewrite(graph: ir.Graph, found: DecodeAttention, made: _Made, whole: bool) -> None:
    """Rewrite one layer; `whole`: with the one operator for what follows the rotation."""
    _, heads, slots, width = found.slots
    turned, rows, name = found.heads + heads, found.heads // heads, found.packed.name
    mask = made.mask(found, slots, rows)
    joined = reshape(graph, found.split, found.packed, (turned + heads, 1, width), "heads")
    angles = constant(graph, f"rotary.rows_{turned}_{heads}", [[0]] * turned + [[1]] * heads)
    node = ir.node(_OPERATOR, [joined, angles, *made.turns(found)], attributes={"interleaved": 0}, domain=_DOMAIN)
    _place(graph, found.split, node, (turned + heads, 1, width), f"{name}.rotated")
    counts = constant(graph, f"split_{found.heads}_{heads}_{heads}", [found.heads, heads, heads])
    split = ir.node("Split", [node.outputs[0], counts], attributes={"axis": 0}, num_outputs=3)
    graph.insert_before(found.split, split)
    for out, count, kind in zip(split.outputs, (found.heads, heads, heads), ("query", "key", "value"), strict=True):
        out.name, out.shape, out.type = f"{name}.{kind}", ir.Shape((count, 1, width)), ir.TensorType(ir.DataType.FLOAT)
    query, key, value = split.outputs
    for filled, new in ((found.key, key), (found.value, value)):
        filled.node.replace_input_with(1, made.index(found, filled.node.inputs[1], heads))
        filled.node.replace_input_with(2, new)
    if not whole:
        replace(graph, found.rotation.end, reshape(graph, found.rotation.end, query, (1, found.heads, 1, width), "turned"))
        found.mask.replace_input_with(1 - found.scores, mask)
        return
    query = reshape(graph, found.end, query, (1, heads, rows, width), "rows")
    filled_slots = (found.key.node.outputs[0], found.value.node.outputs[0])
    attended = ir.node(_ATTENTION, [query, *filled_slots, mask], attributes={"scale": found.scale})
    _place(graph, found.end, attended, (1, heads, rows, width), f"{found.end.outputs[0].name}.attended")
    found.end.replace_input_with(0, attended.outputs[0])


def _place(graph: ir.Graph, before: ir.Node, node: ir.Node, shape: tuple[int, ...], name: str, dtype: ir.DataType | None = None) -> None:
    graph.insert_before(before, node)
    out = node.outputs[0]
    out.name, out.shape, out.type = name, ir.Shape(shape), ir.TensorType(dtype or ir.DataType.FLOAT)


def _free(found: DecodeAttention) -> ir.Value | None:
    """The first free slot, int64 `[1, 1]`, as `AppendInPlacePass` hands it to the ScatterND."""
    index = made_by(found.key.node.inputs[1], "Where")
    free = index.inputs[1] if index is not None else None
    return free if sizes(free) == (1, 1) else None
