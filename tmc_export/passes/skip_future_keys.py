"""Let the rows of a prompt leave out the keys of later rows: causal attention in blocks of rows, without a map of all rows.

Before, with T rows, P past keys and s = P + T keys: `Softmax(q·Kᵀ + mask [b, 1, T, s])·V` for all rows at once; a row's weights for
what comes after it are computed, and are zero.
After, per block of rows [from, to): the same for those rows over the first P + to keys; Concat puts the rows together. Query heads that
share a key-value head are rows of one product, so that no key is copied per query head.

Rows must come in the order of the conversation, as those of a turn do: what is not yet said is hidden from them by the mask anyway, so
that nothing changes but the work. Zero weights add zero: the result is the same to the last bits.

The graphs of `engines/` keep the whole form, which TensorRT-RTX fuses.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes

from tmc_export.passes._rewrite import add, constant, made_by, replace, reshape, shared_heads, sizes

__all__ = ["SkipFutureKeysPass"]

_ROWS, _PRODUCT_ROWS, _LEAST_BLOCKS, _MOST_BLOCKS = 64, 128, 2, 12
"""Rows of a block, and of its products, at least; blocks that are worth their nodes, and that a graph may have per layer."""


@dataclass(frozen=True)
class _Attention:
    """One layer's attention.

    Attributes:
        end: the product with the values, `[b, h, T, d]`.
        query: `[b, h, T, d]`, scaled.
        key, value: `[b, g, s, d]`.
        mask: `[b, 1, T, s]`.
    """

    end: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value


class SkipFutureKeysPass(ir.passes.InPlacePass):
    """Cut causal attention of many rows into blocks. Shapes must be numbers; rows ascend, padding stands behind them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any attention was cut."""
        found = [a for node in model.graph if (a := _attention(node)) is not None]
        masks: dict[tuple[ir.Value, int], ir.Value] = {}
        return ir.passes.PassResult(model, any([_cut(model.graph, attention, masks) for attention in found]))


def _attention(softmax: ir.Node) -> _Attention | None:
    if softmax.op_type != "Softmax" or softmax.outputs[0].is_graph_output() or len(softmax.outputs[0].uses()) != 1:
        return None
    total, end = made_by(softmax.inputs[0], "Add"), next(use.node for use in softmax.outputs[0].uses())
    product = made_by(total.inputs[0], "MatMul") if total is not None else None
    turned = made_by(product.inputs[1], "Transpose") if product is not None else None
    if total is None or product is None or turned is None or turned.attributes.get_ints("perm", []) != (0, 1, 3, 2):
        return None
    query, key, value, mask = product.inputs[0], turned.inputs[0], end.inputs[1], total.inputs[1]
    if end.op_type != "MatMul" or end.inputs[0] is not softmax.outputs[0] or end.outputs[0].is_graph_output():
        return None
    if query is None or key is None or value is None or mask is None:
        return None
    return _Attention(end, query, shared_heads(key) or key, shared_heads(value) or value, mask)


def _rows(rows: int, sharing: int) -> int:
    """Rows of a block, a multiple of 32: as few as make a good product, as many as keep the graph small."""
    least = max(_ROWS, _PRODUCT_ROWS // sharing, -(-rows // _MOST_BLOCKS))
    return -(-least // 32) * 32


def _cut(graph: ir.Graph, found: _Attention, masks: dict[tuple[ir.Value, int], ir.Value]) -> bool:
    query, key, value, mask = (sizes(v) for v in (found.query, found.key, found.value, found.mask))
    if query is None or key is None or value is None or mask is None or len(query) != 4 or len(key) != 4 or len(value) != 4:
        return False
    batch, heads, count, _ = query
    groups, keys = key[1:3]
    if mask != (batch, 1, count, keys) or value[:3] != key[:3] or heads % groups or keys < count:
        return False
    step = _rows(count, heads // groups)
    starts = range(0, count, step)
    if len(starts) < _LEAST_BLOCKS:
        return False
    parts = [_block(graph, found, start, min(start + step, count), masks) for start in starts]
    whole = add(graph, found.end, ir.node("Concat", parts, attributes={"axis": 2}), (batch, heads, count, value[3]), "rows")
    replace(graph, found.end, whole)
    return True


def _block(graph: ir.Graph, found: _Attention, start: int, stop: int, masks: dict[tuple[ir.Value, int], ir.Value]) -> ir.Value:
    """The rows [start, stop) of the attention, `[b, h, stop - start, d]`."""
    (batch, heads, count, width), (_, groups, keys, out) = sizes(found.query) or (), sizes(found.value) or ()
    rows, seen, at, name = stop - start, keys - count + stop, found.end, f"from_{start}"
    wide = (batch, groups, heads // groups * rows)
    query = _slice(graph, at, found.query, 2, start, stop, f"{name}.query")
    key = found.key if seen == keys else _slice(graph, at, found.key, 2, 0, seen, f"{name}.key")
    value = found.value if seen == keys else _slice(graph, at, found.value, 2, 0, seen, f"{name}.value")
    if (found.mask, start) not in masks:
        mine = _slice(graph, at, found.mask, 2, start, stop, f"{name}.mask_rows")
        masks[found.mask, start] = mine if seen == keys else _slice(graph, at, mine, 3, 0, seen, f"{name}.mask")
    turn = ir.node("Transpose", [key], attributes={"perm": [0, 1, 3, 2]})
    turned = add(graph, at, turn, (batch, groups, width, seen), f"{name}.keys")
    merged = reshape(graph, at, query, (*wide, width), f"{name}.merged")
    scores = add(graph, at, ir.node("MatMul", [merged, turned]), (*wide, seen), f"{name}.scores")
    scores = reshape(graph, at, scores, (batch, heads, rows, seen), f"{name}.heads")
    total = add(graph, at, ir.node("Add", [scores, masks[found.mask, start]]), (batch, heads, rows, seen), f"{name}.masked")
    weights = add(graph, at, ir.node("Softmax", [total], attributes={"axis": -1}), (batch, heads, rows, seen), f"{name}.weights")
    weights = reshape(graph, at, weights, (*wide, seen), f"{name}.shared")
    mixed = add(graph, at, ir.node("MatMul", [weights, value]), (*wide, out), f"{name}.mixed")
    return reshape(graph, at, mixed, (batch, heads, rows, out), name)


def _slice(graph: ir.Graph, before: ir.Node, value: ir.Value, axis: int, start: int, stop: int, suffix: str) -> ir.Value:
    shape = list(sizes(value) or ())
    shape[axis] = stop - start
    ends = [constant(graph, f"place_{n}", [n]) for n in (start, stop, axis)]
    return add(graph, before, ir.node("Slice", [value, *ends]), tuple(shape), suffix)
