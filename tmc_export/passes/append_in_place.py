"""Let a decode step write its new key and value into the slots, not copy all slots to put one row behind them.

Before, with one new token: `Concat(past [b, g, C - 1, d], new [b, g, 1, d]) → [b, g, C, d]`, and the same for the vectors that say what a
slot holds, `Concat(past_order [b, C - 1], order [b, 1])`.
After, with inputs of C slots: `ScatterND(past [b, g, C, d], s, new)`, s the first free slot (slots are filled in order, so it is the count
of valid ones), and `Where(slot = s, order, past_order)`. Behind it nothing changes, shapes included; the graph was made for one slot less.

The filled slots are outputs, `slots.<l>.key` and `.value`, in place of the new rows `present.<l>.key` and `.value`: a runtime that gives an
output the memory of its input appends in place (onnxruntime's ScatterND then writes the one row), any other gets a copy.

Slots of fp8 codes, which ScatterND does not take, are widened before: `Concat(DequantizeLinear(past), new)` becomes a ScatterND into what
was widened, which only attention reads. The graph then returns the new row's codes, `present.*`, as a chunk does; the runtime writes them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.core.errors import ExportError
from tmc_export.passes._rewrite import add, constant, made_by, replace, sizes

__all__ = ["AppendInPlacePass"]

_SLOTS = "past_key_values."


class AppendInPlacePass(ir.passes.InPlacePass):
    """Replace what appends one token to inputs `past_*` by what writes it into the first free of one slot more. Shapes must be numbers."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether anything was replaced.

        Raises:
            ExportError: an input `past_*` is read by anything but the Concat that lengthens it.
        """
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        valid, new = sizes(inputs.get("past_valid")), sizes(inputs.get("valid"))
        if valid is None or new is None or new[1] != 1:
            return ir.passes.PassResult(model, False)
        found = [(node, past) for node in graph if (past := _appended(node)) is not None]
        alone = {past.name for node, past in found if len(past.uses()) == 1 and node.inputs[0] and len(node.inputs[0].uses()) == 1}
        lost = sorted({n for n in inputs if n and n.startswith("past_")} - alone)
        if lost:
            raise ExportError(
                f"{graph.name}: '{lost[0]}' is not read by the one Concat that appends the new token; it cannot be filled in place"
            )
        for value in {value for node, past in found for value in (past, node.inputs[0]) if value is not None}:
            shape = list(sizes(value) or ())
            shape[1 if len(shape) == 2 else 2] += 1
            value.shape = ir.Shape(shape)
        place, returned = _Place(graph, inputs["past_valid"], valid[0], valid[1] + 1), {value.name: value for value in graph.outputs}
        for node, past in found:
            name, direct = (past.name or "").removeprefix(_SLOTS), node.inputs[0] is past
            replace(graph, node, place.write(node, past))
            if direct and f"present.{name}" in returned:
                graph.outputs.remove(returned[f"present.{name}"])
        return ir.passes.PassResult(model, bool(found))


def _appended(node: ir.Node) -> ir.Value | None:
    """The `past_*` input that a Concat lengthens, as it is or widened from codes."""
    past = node.inputs[0] if node.op_type == "Concat" and node.domain in ("", "ai.onnx") and len(node.inputs) == 2 else None
    if (widened := made_by(past, "DequantizeLinear")) is not None:
        past = widened.inputs[0]
    return past if past is not None and past.is_graph_input() and (past.name or "").startswith("past_") else None


class _Place:
    """The first free slot, in the shapes that ScatterND and Where read it; made at the head of the graph, once."""

    def __init__(self, graph: ir.Graph, valid: ir.Value, batch: int, slots: int) -> None:
        self.graph, self.batch, self.slots = graph, batch, slots
        self._last: ir.Node | None = None
        self._row: ir.Value | None = None
        self._indices: dict[int, ir.Value] = {}
        count = self._add("Cast", [valid], (batch, slots), ir.DataType.INT64, "free.valid", to=int(ir.DataType.INT64))
        self.free = self._add(
            "ReduceSum", [count, constant(self.graph, "free.axis", [1])], (batch, 1), ir.DataType.INT64, "free", keepdims=1
        )

    def write(self, before: ir.Node, past: ir.Value) -> ir.Value:
        """Add what writes the second input of a Concat into the free slot of its first, which is `past`, or `past` widened."""
        name, shape, (read, new) = past.name or "", sizes(past) or (), before.inputs
        if len(shape) == 2 and past.dtype is ir.DataType.BOOL:  # onnxruntime has no Where of bools; the free slot holds False
            filled = ir.node("And", [self._at(), new])
            add(self.graph, before, filled, shape, "new")
            node = ir.node("Or", [filled.outputs[0], past])
        elif len(shape) == 2:
            node = ir.node("Where", [self._at(), new, past])
        else:
            node = ir.node("ScatterND", [read, self._index(shape[1]), new])
            if read is past:
                self.graph.outputs.append(node.outputs[0])
        out = node.outputs[0]
        out.name = f"{name}.filled" if len(shape) == 2 or read is not past else name.replace(_SLOTS, "slots.", 1)
        out.shape, out.type = past.shape, read.type if read is not None else past.type
        self.graph.insert_before(before, node)
        return out

    def _at(self) -> ir.Value:
        """bool `[b, C]`: which slot is the free one."""
        if self._row is None:
            slots = constant(self.graph, "free.slots", np.arange(self.slots)[None])
            self._row = self._add("Equal", [slots, self.free], (self.batch, self.slots), ir.DataType.BOOL, "free.row")
        return self._row

    def _index(self, heads: int) -> ir.Value:
        """int64 `[b, g, 1, 3]`: batch, head and slot of every row that is written."""
        if heads not in self._indices:
            shape = (self.batch, heads, 1, 3)
            places = np.indices(shape[:3]).transpose(1, 2, 3, 0)  # batch, head, and 0 where the slot comes
            lead = constant(self.graph, f"free.rows_{heads}", places)
            column = constant(self.graph, "free.column", [False, False, True], np.bool_)
            free = self.free
            if self.batch > 1:
                one = (self.batch, 1, 1, 1)
                free = self._add("Reshape", [free, constant(self.graph, "free.one", one)], one, ir.DataType.INT64, f"free.column_{heads}")
            self._indices[heads] = self._add("Where", [column, free, lead], shape, ir.DataType.INT64, f"free.index_{heads}")
        return self._indices[heads]

    def _add(
        self, operator: str, inputs: list[ir.Value], shape: tuple[int, ...], dtype: ir.DataType, name: str, **attributes: int
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes)
        out = node.outputs[0]
        out.name, out.shape, out.type = name, ir.Shape(shape), ir.TensorType(dtype)
        if self._last is None:
            self.graph.insert_before(next(iter(self.graph)), node)
        else:
            self.graph.insert_after(self._last, node)
        self._last = node
        return out
