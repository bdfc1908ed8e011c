"""Keep keys and values in the slots as codes, int8 or fp8, with a scale per KV head that was found on data.

Before, per layer: `Concat(past [b, g, P, d], new [b, g, T, d])`, which attention reads, and the output `present = new`.
After: `c = QuantizeLinear(new, s [g], axis=1)`, `DequantizeLinear(Concat(past int8, c), s, axis=1)`, and the output `present = c`. A
compress graph that reads a layer's slots alone, `key.<l>`, reads them through `DequantizeLinear(key int8, s)`.
ONNX's Concat does not take fp8, so that both sides are widened before it: `Concat(DequantizeLinear(past fp8, s), DequantizeLinear(c, s))`.

Attention sees the new rows as the slots will give them back, not as they were: a row is the same number in the prefill that makes it, in
the chunk behind it and in every decode step, so that neither route nor bucket changes an answer. Codes are rounded to the nearest, ties to
even, int8 within -128 and 127, fp8 (E4M3) within -448 and 448; there is no zero point but 0.

The pass comes first, on the symbolic graph: the passes behind it see one Concat per tensor, as without codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.core.errors import ExportError
from tmc_export.passes._rewrite import constant

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["QuantizeSlotsPass"]

_PAST, _KEYS, _NEW = "past_key_values.", ("key.", "next_key."), "present."


class QuantizeSlotsPass(ir.passes.InPlacePass):
    """Make every input that brings slots, and every output that fills them, codes.

    Args:
        scales: `<layer>.key` and `<layer>.value` → `[g]`, in the type that the graph computes in.
        code: type of the codes, INT8 or FLOAT8E4M3FN.
    """

    def __init__(self, scales: Mapping[str, NDArray[Any]], code: ir.DataType = ir.DataType.INT8) -> None:
        super().__init__()
        self.scales, self.code = dict(scales), code

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether it has slots.

        Raises:
            ExportError: a tensor has no scales, its past is read by anything but one Concat, or the new rows are no output of the graph.
        """
        graph, found = model.graph, []
        for value in graph.inputs:
            if (name := _slots(value.name or "")) is not None:
                if name not in self.scales:
                    raise ExportError(
                        f"{graph.name}: '{value.name}' has no scales; scales were found for: {', '.join(sorted(self.scales))}"
                    )
                found.append((value, name))
        for value, name in found:
            _rewrite(graph, value, name, self.scales[name], self.code)
        return ir.passes.PassResult(model, bool(found))


def _slots(name: str) -> str | None:
    """Which slots an input brings: `<layer>.key` or `<layer>.value`; None for other inputs."""
    if name.startswith(_PAST):
        return name.removeprefix(_PAST)
    prefix = next((p for p in _KEYS if name.startswith(p)), None)
    return None if prefix is None else f"{name.removeprefix(prefix)}.key"


def _rewrite(graph: ir.Graph, value: ir.Value, name: str, scales: NDArray[Any], code: ir.DataType) -> None:
    scale = constant(graph, f"slots.{name}.scale", scales, scales.dtype)
    exact = value.type
    value.type = ir.TensorType(code)
    by = [scale]
    if code is ir.DataType.FLOAT8E4M3FN:  # onnxruntime 1.23 moves such nodes, and takes codes without a zero point for uint8
        by.append(_zero(graph, len(scales), code))
    joined = _joined(value)
    if joined is None:
        if (value.name or "").startswith(_PAST):
            raise ExportError(f"{graph.name}: '{value.name}' is not read by the one Concat that puts new rows behind it")
        if value.uses():
            _widen(graph, value, by, exact, next(iter(graph)), before=True)
    else:
        new = joined.inputs[1]
        if new is None:
            raise ExportError(f"{graph.name}: nothing is put behind '{value.name}'")
        rounding = ir.node(
            "QuantizeLinear", [new, scale, _zero(graph, len(scales), code)], attributes={"axis": 1}, name=f"slots.{name}.quantize"
        )
        codes = rounding.outputs[0]
        codes.name, codes.shape, codes.type = f"slots.{name}.codes", new.shape, value.type
        graph.insert_before(joined, rounding)
        joined.replace_input_with(1, codes)
        if code is ir.DataType.FLOAT8E4M3FN:
            _widen(graph, value, by, exact, joined, before=True)
            _widen(graph, codes, by, exact, joined, before=True)
        else:
            joined.outputs[0].type = value.type
            _widen(graph, joined.outputs[0], by, exact, joined)
        if value.name is not None and value.name.startswith(_PAST):
            _return(graph, f"{_NEW}{name}", new, codes)


def _zero(graph: ir.Graph, heads: int, code: ir.DataType) -> ir.Value:
    """The zero point 0 of every head, which says what the codes are."""
    return constant(graph, f"slots.zero_{heads}", np.zeros(heads), code.numpy())


def _joined(value: ir.Value) -> ir.Node | None:
    """The one node that puts new rows behind a past, if that is all that reads it."""
    readers = _readers(value)
    node = readers[0][0] if len(readers) == 1 else None
    return node if node is not None and node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is value else None


def _readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Who reads the numbers, and as which input; a shape stays the shape of codes."""
    return [(use.node, use.idx) for use in value.uses() if use.node.op_type != "Shape"]


def _widen(
    graph: ir.Graph, codes: ir.Value, by: list[ir.Value], exact: ir.TypeProtocol | None, place: ir.Node, before: bool = False
) -> None:
    """Let every reader of codes read what they stand for, by a scale and maybe a zero point."""
    node = ir.node("DequantizeLinear", [codes, *by], attributes={"axis": 1}, name=f"{codes.name}.dequantize")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{codes.name}.dequantized", codes.shape, exact
    readers = [(reader, index) for reader, index in _readers(codes) if reader is not node]
    if before:
        graph.insert_before(place, node)
    else:
        graph.insert_after(place, node)
    for reader, index in readers:
        reader.replace_input_with(index, out)


def _return(graph: ir.Graph, name: str, new: ir.Value, codes: ir.Value) -> None:
    """Return the codes under the name that the new rows had."""
    for index, value in enumerate(graph.outputs):
        if value.name == name:
            producer = value.producer()
            copied = producer is not None and producer.op_type == "Identity" and producer.inputs[0] is new
            if value is not new and not copied:
                raise ExportError(f"{graph.name}: '{name}' is not what is put behind the slots")
            value.name, codes.name = f"{name}.exact", name
            graph.outputs[index] = codes
            return
    raise ExportError(f"{graph.name}: the new rows '{name}' are no output")
