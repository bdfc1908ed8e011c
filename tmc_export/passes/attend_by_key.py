"""Attention of a decode step with the query heads of a key as rows: the standard operator, behind onnxruntime's rotation of all heads.

Before, per layer: what `_decode_attention` finds. After: the heads `[1, h + 2g, 1, d]`, `Split → [q k], v`, one
`com.microsoft::RotaryEmbedding` of all heads of both, `Split → q, k`, and `Attention` (opset 23) of `[1, g, h / g, d]` on g heads of slots,
with a mask made of the first free slot alone. With h heads of one row each it would read a key once per query head.

For attention that `fuse_decode_attention` would make slower. `GroupQueryAttention` multiplies every query head by itself with the keys that
are filled; here the query heads of a KV head are rows of one product with all slots. So this form is for many heads that share a key
(`LEAST_SHARING`), in many slots (`LEAST_SLOTS`) that pictures fill for the most part (`LEAST_FILLED`). `benchmarks/decode_attention.py` has
both forms beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        factors, masks = Factors(model.graph), dict[tuple[int, int], ir.Value]()
        whole = not any(node.op_type == _ROUNDING for node in model.graph)
        for attention in found:
            _rewrite(model.graph, attention, factors, masks, whole)
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


def _rewrite(graph: ir.Graph, found: DecodeAttention, factors: Factors, masks: dict[tuple[int, int], ir.Value], whole: bool) -> None:
    """Rewrite one layer; `whole`: with the one operator for what follows the rotation."""
    _, heads, slots, width = found.slots
    rows = found.heads // heads
    packed = reshape(graph, found.split, found.packed, (1, found.heads + 2 * heads, 1, width), "heads")
    joined, value = _split(graph, found.split, packed, {"joined": found.heads + heads, "value": heads})
    turns = [factors.row(factor).outputs[0] for factor in found.factors]
    here = constant(graph, "rotary.row", [[0]])
    turned = ir.node(_OPERATOR, [joined, here, *turns], attributes={"interleaved": 0}, domain=_DOMAIN)
    _place(graph, found.split, turned, sizes(joined) or (), f"{found.packed.name}.rotated")
    query, key = _split(graph, found.split, turned.outputs[0], {"query": found.heads, "key": heads})
    for node, part in ((found.key_rotation.end, key), (made_by(found.value.new, "Reshape"), value)):
        if node is not None:
            replace(graph, node, part)
    if (slots, rows) not in masks:
        masks[slots, rows] = _seen(graph, found, slots, rows)
    if not whole:
        replace(graph, found.rotation.end, query)
        found.mask.replace_input_with(1 - found.scores, masks[slots, rows])
        return
    query = reshape(graph, found.end, query, (1, heads, rows, width), "rows")
    filled = (found.key.node.outputs[0], found.value.node.outputs[0])
    attended = ir.node(_ATTENTION, [query, *filled, masks[slots, rows]], attributes={"scale": found.scale})
    _place(graph, found.end, attended, (1, heads, rows, width), f"{found.end.outputs[0].name}.attended")
    found.end.replace_input_with(0, attended.outputs[0])


def _split(graph: ir.Graph, before: ir.Node, value: ir.Value, parts: dict[str, int]) -> Sequence[ir.Value]:
    """Put a Split of the heads `[1, h, 1, d]` before a node; parts by what they are."""
    counts = constant(graph, f"split_{'_'.join(map(str, parts.values()))}", list(parts.values()))
    node = ir.node("Split", [value, counts], attributes={"axis": 1}, num_outputs=len(parts))
    graph.insert_before(before, node)
    _, _, one, width = sizes(value) or (1, 1, 1, 1)
    for out, (name, count) in zip(node.outputs, parts.items(), strict=True):
        out.name, out.shape, out.type = f"{value.name}.{name}", ir.Shape((1, count, one, width)), ir.TensorType(ir.DataType.FLOAT)
    return node.outputs


def _place(graph: ir.Graph, before: ir.Node, node: ir.Node, shape: tuple[int, ...], name: str, dtype: ir.DataType | None = None) -> None:
    graph.insert_before(before, node)
    out = node.outputs[0]
    out.name, out.shape, out.type = name, ir.Shape(shape), ir.TensorType(dtype or ir.DataType.FLOAT)


def _free(found: DecodeAttention) -> ir.Value | None:
    """The first free slot, int64 `[1, 1, 1, 1]`, as `AppendInPlacePass` hands it to the ScatterND."""
    index = made_by(found.key.node.inputs[1], "Concat")
    spread = made_by(index.inputs[1], "Expand") if index is not None and len(index.inputs) == 2 else None
    column = spread.inputs[0] if spread is not None else None
    return column if sizes(column) == (1, 1, 1, 1) else None


def _seen(graph: ir.Graph, found: DecodeAttention, slots: int, rows: int) -> ir.Value:
    """float `[rows, C]`: 0 up to the first free slot, which the token itself fills, `_HIDDEN` behind it."""
    name = f"slots.seen_{rows}x{slots}"
    free = ir.node("Reshape", [_free(found), constant(graph, "slots.free.shape", [1, 1])])
    _place(graph, found.split, free, (1, 1), f"{name}.free", ir.DataType.INT64)
    places = constant(graph, f"slots.places_{rows}x{slots}", np.tile(np.arange(slots), (rows, 1)))
    up_to = ir.node("LessOrEqual", [places, free.outputs[0]])
    _place(graph, found.split, up_to, (rows, slots), f"{name}.flags", ir.DataType.BOOL)
    ends = [constant(graph, f"seen.{word}", number, np.float32) for word, number in (("yes", 0), ("no", _HIDDEN))]
    node = ir.node("Where", [up_to.outputs[0], *ends])
    _place(graph, found.split, node, (rows, slots), name)
    return node.outputs[0]
