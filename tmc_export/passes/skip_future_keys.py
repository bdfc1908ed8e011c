"""Let the rows of a prompt leave out the keys of later rows: causal attention in blocks of rows, without a map of all rows.

Before, with T rows, P past keys and s = P + T keys: `Softmax(q·Kᵀ + mask [b, 1, T, s])·V` for all rows at once; a row's weights for
what comes after it are computed, and are zero.
After, per block of rows [from, to): the same for those rows over the first P + to keys; Concat puts the rows together. Query heads that
share a key-value head are rows of one product, so that no key is copied per query head.

Sums over rows of the map (`surgery._sums`) are added up block by block: `MatMul(which [b, u, T], ReduceMax(map))`, or with the map itself.

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

_ROWS, _SUMMED_ROWS, _PRODUCT_ROWS, _LEAST_BLOCKS, _MOST_BLOCKS = 64, 32, 128, 2, 12
"""Rows of a block, of one whose rows are added up, and of its products, at least; blocks that are worth their nodes, and that a layer may
have where nothing is added up."""


@dataclass(frozen=True)
class _Attention:
    """One layer's attention.

    Attributes:
        end: the product with the values, `[b, h, T, d]`.
        query: `[b, h, T, d]`, scaled.
        key, value: `[b, g, s, d]`.
        mask: `[b, 1, T, s]`.
        sums: products `which · map`, with the map or with its maximum over heads.
    """

    end: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value
    sums: tuple[ir.Node, ...]


class SkipFutureKeysPass(ir.passes.InPlacePass):
    """Cut causal attention of many rows into blocks. Shapes must be numbers; rows ascend, padding stands behind them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any attention was cut."""
        found = [a for node in model.graph if (a := _attention(node)) is not None]
        masks: dict[tuple[ir.Value, int], ir.Value] = {}
        modified = any([_cut(model.graph, attention, masks) for attention in found])
        if modified:
            model.graph.sort()  # a sum may stand before what is now its part
        return ir.passes.PassResult(model, modified)


def _attention(softmax: ir.Node) -> _Attention | None:
    if softmax.op_type != "Softmax" or softmax.outputs[0].is_graph_output():
        return None
    ends = [node for node, index in softmax.outputs[0].uses() if node.op_type == "MatMul" and index == 0]
    sums = [_sum(node, index) for node, index in softmax.outputs[0].uses() if node not in ends]
    if len(ends) != 1 or None in sums:
        return None
    total, end = made_by(softmax.inputs[0], "Add"), ends[0]
    product = made_by(total.inputs[0], "MatMul") if total is not None else None
    turned = made_by(product.inputs[1], "Transpose") if product is not None else None
    if total is None or product is None or turned is None or turned.attributes.get_ints("perm", []) != (0, 1, 3, 2):
        return None
    query, key, value, mask = product.inputs[0], turned.inputs[0], end.inputs[1], total.inputs[1]
    if query is None or key is None or value is None or mask is None:
        return None
    found = tuple(node for node in sums if node is not None)
    return _Attention(end, query, shared_heads(key) or key, shared_heads(value) or value, mask, found)


def _sum(node: ir.Node, index: int) -> ir.Node | None:
    """The product that adds up rows of what a reader of the map makes of it, if it is one."""
    if node.op_type == "ReduceMax":
        readers, alone = list(node.outputs[0].uses()), not node.outputs[0].is_graph_output()
        if node.attributes.get_int("keepdims", True) or _axes(node) != [1] or len(readers) != 1 or not alone:
            return None
        node, index = readers[0]
    return node if node.op_type == "MatMul" and index == 1 and not node.outputs[0].is_graph_output() else None


def _axes(node: ir.Node) -> list[int]:
    value = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return [] if value is None else value.numpy().reshape(-1).tolist()


def _rows(rows: int, sharing: int, summed: bool) -> int:
    """Rows of a block, a multiple of 32: as few as make a good product, as many as keep the graph small.

    Where rows are added up, as few as leave the block's part of the map in the cache until it is read again.
    """
    least = _PRODUCT_ROWS // sharing
    least = max(least, _SUMMED_ROWS) if summed else max(least, _ROWS, -(-rows // _MOST_BLOCKS))
    return -(-least // 32) * 32


def _cut(graph: ir.Graph, found: _Attention, masks: dict[tuple[ir.Value, int], ir.Value]) -> bool:
    query, key, value, mask = (sizes(v) for v in (found.query, found.key, found.value, found.mask))
    if query is None or key is None or value is None or mask is None or len(query) != 4 or len(key) != 4 or len(value) != 4:
        return False
    batch, heads, count, _ = query
    groups, keys = key[1:3]
    if mask != (batch, 1, count, keys) or value[:3] != key[:3] or heads % groups or keys < count:
        return False
    step = _rows(count, heads // groups, bool(found.sums))
    starts = range(0, count, step)
    if len(starts) < _LEAST_BLOCKS:
        return False
    sums: list[list[ir.Value]] = [[] for _ in found.sums]
    parts = [_block(graph, found, start, min(start + step, count), masks, sums) for start in starts]
    for node, added in zip(found.sums, sums, strict=True):
        total = added[0]
        for number, part in enumerate(added[1:], 1):
            total = add(graph, node, ir.node("Add", [total, part]), sizes(part) or (), f"to_{number}")
        replace(graph, node, total)
    whole = add(graph, found.end, ir.node("Concat", parts, attributes={"axis": 2}), (batch, heads, count, value[3]), "rows")
    replace(graph, found.end, whole)
    return True


def _block(
    graph: ir.Graph, found: _Attention, start: int, stop: int, masks: dict[tuple[ir.Value, int], ir.Value], sums: list[list[ir.Value]]
) -> ir.Value:
    """The rows [start, stop) of the attention, `[b, h, stop - start, d]`; what they add to each sum is put behind its list."""
    (batch, heads, count, width), (_, groups, keys, out) = sizes(found.query) or (), sizes(found.value) or ()
    rows, seen, at, name = stop - start, keys - count + stop, found.end, f"from_{start}"
    wide = (batch, groups, heads // groups * rows)
    query = _slice(graph, at, found.query, {2: (start, stop)}, f"{name}.query")
    key = found.key if seen == keys else _slice(graph, at, found.key, {2: (0, seen)}, f"{name}.key")
    value = found.value if seen == keys else _slice(graph, at, found.value, {2: (0, seen)}, f"{name}.value")
    if (found.mask, start) not in masks:
        masks[found.mask, start] = _slice(graph, at, found.mask, {2: (start, stop), 3: (0, seen)}, f"{name}.mask")
    turn = ir.node("Transpose", [key], attributes={"perm": [0, 1, 3, 2]})
    turned = add(graph, at, turn, (batch, groups, width, seen), f"{name}.keys")
    merged = reshape(graph, at, query, (*wide, width), f"{name}.merged")
    scores = add(graph, at, ir.node("MatMul", [merged, turned]), (*wide, seen), f"{name}.scores")
    scores = reshape(graph, at, scores, (batch, heads, rows, seen), f"{name}.heads")
    total = add(graph, at, ir.node("Add", [scores, masks[found.mask, start]]), (batch, heads, rows, seen), f"{name}.masked")
    weights = add(graph, at, ir.node("Softmax", [total], attributes={"axis": -1}), (batch, heads, rows, seen), f"{name}.weights")
    for node, parts in zip(found.sums, sums, strict=True):
        parts.append(_added(graph, node, weights, start, stop, keys))
    weights = reshape(graph, at, weights, (*wide, seen), f"{name}.shared")
    mixed = add(graph, at, ir.node("MatMul", [weights, value]), (*wide, out), f"{name}.mixed")
    return reshape(graph, at, mixed, (batch, heads, rows, out), name)


def _added(graph: ir.Graph, node: ir.Node, weights: ir.Value, start: int, stop: int, keys: int) -> ir.Value:
    """What the rows [start, stop) add to a sum over rows, over all keys."""
    which, read = node.inputs[0], node.inputs[1]
    name, shape = f"from_{start}", sizes(weights) or ()
    seen = shape[-1]
    if made_by(read, "ReduceMax") is not None:
        most = ir.node("ReduceMax", [weights, constant(graph, "place_1", [1])], attributes={"keepdims": 0})
        weights = add(graph, node, most, (shape[0], *shape[2:]), f"{name}.most")
    mine = _slice(graph, node, which, {len(sizes(which) or ()) - 1: (start, stop)}, f"{name}.which")
    whole = list(sizes(node.outputs[0]) or ())
    part = add(graph, node, ir.node("MatMul", [mine, weights]), (*whole[:-1], seen), f"{name}.part")
    if seen == keys:
        return part
    ends = constant(graph, f"behind_{len(whole)}_{keys - seen}", [0] * (2 * len(whole) - 1) + [keys - seen])
    return add(graph, node, ir.node("Pad", [part, ends]), tuple(whole), f"{name}.padded")


def _slice(graph: ir.Graph, before: ir.Node, value: ir.Value | None, axes: dict[int, tuple[int, int]], suffix: str) -> ir.Value:
    """Put a Slice before a node: axis → from and to."""
    shape = list(sizes(value) or ())
    for axis, (start, stop) in axes.items():
        shape[axis] = stop - start
    columns = [[start for start, _ in axes.values()], [stop for _, stop in axes.values()], list(axes)]
    ends = [constant(graph, f"places_{'_'.join(map(str, column))}", column) for column in columns]
    return add(graph, before, ir.node("Slice", [value, *ends]), tuple(shape), suffix)
