"""The attention of a decode step as onnxruntime's one operator for it.

Before, per layer: what `_decode_attention` finds, some twenty nodes that cost more to start than to compute.
After: `com.microsoft::GroupQueryAttention(qkv, K slots, V slots)`, which does the same. Slots of int8 codes (`quantize_slots`)
stay codes: the operator rounds the new row, attends with it as it is stored, and widens codes as it multiplies. It takes a scale per KV
head and channel, so that each is given its head's.

Only for bundles that onnxruntime runs: TensorRT knows no such operator, and the graphs of `engines/` never have it. It rotates with row
`seqlens_k` of a table; positions have gaps where tokens were dropped, so every row of the table is that of the token's own position.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.passes._decode_attention import DecodeAttention, Factors, decode_attention
from tmc_export.passes._rewrite import constant, replace, sizes

__all__ = ["FUSED", "FuseDecodeAttentionPass"]

_DOMAIN, _OPERATOR = "com.microsoft", "GroupQueryAttention"
FUSED = f"{_DOMAIN}::{_OPERATOR}"
"""The operator that this pass puts in."""


class FuseDecodeAttentionPass(ir.passes.InPlacePass):
    """Replace the attention of every layer whose query, key and value come from one projection; of one sequence, in float32."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any attention was replaced."""
        found = [a for node in model.graph if (a := decode_attention(node)) is not None]
        if not found:
            return ir.passes.PassResult(model, False)
        tables = _Tables(model.graph)
        for attention in found:
            _fuse(model.graph, attention, tables)
        model.opset_imports[_DOMAIN] = 1
        return ir.passes.PassResult(model, True)


class _Tables:
    """Rotary tables `[C, d / 2]` and the count of filled slots, made once at the head of the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self._factors = graph, Factors(graph)
        self._made: dict[tuple[ir.Value, int], ir.Value] = {}
        valid = next(value for value in graph.inputs if value.name == "past_valid")
        add, dtype = self._factors.node, ir.DataType.INT32
        flags = add(None, "Cast", [valid], sizes(valid) or (), dtype, "filled.valid", to=int(dtype))
        count = add(flags, "ReduceSum", [flags.outputs[0], constant(graph, "filled.axis", [1])], (1,), dtype, "filled", keepdims=0)
        self.filled = count.outputs[0]

    def table(self, factor: ir.Value, slots: int) -> ir.Value:
        """One half of a factor `[1, 1, 1, d]` in every one of `slots` rows."""
        if (factor, slots) not in self._made:
            row, name = self._factors.row(factor), f"{factor.name}.table"
            wide = (slots, (sizes(factor) or (0,))[-1] // 2)
            shape = constant(self.graph, f"{name}.shape", wide)
            self._made[factor, slots] = self._factors.node(row, "Expand", [row.outputs[0], shape], wide, factor.dtype, name).outputs[0]
        return self._made[factor, slots]


def _fuse(graph: ir.Graph, found: DecodeAttention, tables: _Tables) -> None:
    _, heads, slots, _ = found.slots
    node = ir.Node(
        _DOMAIN,
        _OPERATOR,
        [
            found.packed, None, None, found.key.node.inputs[0], found.value.node.inputs[0], tables.filled,
            constant(graph, "slots.count", slots, np.int32), *(tables.table(factor, slots) for factor in found.factors),
            *_scales(graph, found),
        ],
        [
            ir.AttrInt64("num_heads", found.heads), ir.AttrInt64("kv_num_heads", heads), ir.AttrFloat32("scale", found.scale),
            ir.AttrInt64("do_rotary", 1), ir.AttrInt64("rotary_interleaved", 0), *_told(found),
        ],
        num_outputs=3,
    )  # fmt: skip
    graph.insert_before(found.end, node)
    for out, old in zip(node.outputs, (found.end.outputs[0], found.key.node.outputs[0], found.value.node.outputs[0]), strict=True):
        out.name, out.shape, out.type = f"{old.name}.fused", old.shape, old.type
    replace(graph, found.end, node.outputs[0])
    for old_node, out in ((found.key.node, node.outputs[1]), (found.value.node, node.outputs[2])):
        name = old_node.outputs[0].name
        old_node.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
        old_node.outputs[0].name, out.name = f"{name}.scattered", name


def _told(found: DecodeAttention) -> list[ir.Attr]:
    """Attributes that tell the operator of int8 slots."""
    if found.key.scales is None:
        return []
    return [*(ir.AttrString(f"{kind}_quant_type", "PER_CHANNEL") for kind in "kv"), ir.AttrInt64("kv_cache_bit_width", 8)]


def _scales(graph: ir.Graph, found: DecodeAttention) -> list[ir.Value | None]:
    """The inputs behind the rotary tables, up to the scales of keys and values, each `[1, g, 1, d]`; none where slots hold no codes."""
    inputs: list[ir.Value | None] = []
    for filled in (found.key, found.value):
        if filled.scales is not None and filled.scales.const_value is not None:
            each = filled.scales.const_value.numpy().reshape(1, -1, 1, 1)
            wide = np.broadcast_to(each, (1, found.slots[1], 1, found.slots[3]))
            inputs.append(constant(graph, f"{filled.scales.name}.channels", wide, np.float32))
    return [None, None, None, *inputs] if inputs else []  # positions, bias and sinks lie between
