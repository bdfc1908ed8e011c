"""Remove inputs that hold nothing, or that nothing reads.

Before: prefill concatenates a past of zero slots, `Concat(past [1, 2, 0, 64], new [1, 2, 640, 64])`. After: `new` alone, and no such input.
The same where the past is codes that are widened on the way, `Concat(DequantizeLinear(past), new)`.
A compress graph whose method reads no rotary positions gets none.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes

__all__ = ["DropEmptyInputsPass"]


class DropEmptyInputsPass(ir.passes.InPlacePass):
    """Take zero-sized graph inputs out of every Concat, then every unread input out of the graph."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any input went away."""
        graph = model.graph
        empty = [v for v in graph.inputs if v.shape is not None and any(d == 0 for d in v.shape)]
        widened = [node for value in empty for node, _ in value.uses() if node.op_type == "DequantizeLinear"]
        for value in (*empty, *(node.outputs[0] for node in widened)):
            for user, _ in list(value.uses()):
                if user.op_type != "Concat":
                    continue
                rest = [i for i in user.inputs if i is not value]
                if len(rest) == 1 and rest[0] is not None and not user.outputs[0].is_graph_output():
                    user.outputs[0].replace_all_uses_with(rest[0])
                    graph.remove(user, safe=True)
                else:
                    name, shape, kind = user.outputs[0].name, user.outputs[0].shape, user.outputs[0].type
                    node = ir.node("Concat", rest, attributes={"axis": user.attributes["axis"].as_int()})
                    node.outputs[0].shape, node.outputs[0].type = shape, kind
                    graph.insert_after(user, node)
                    user.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
                    graph.remove(user, safe=True)
                    node.outputs[0].name = name
        graph.remove([node for node in widened if not node.outputs[0].uses() and not node.outputs[0].is_graph_output()], safe=True)
        gone = [v for v in graph.inputs if not v.uses() and not v.is_graph_output()]
        for value in gone:
            graph.inputs.remove(value)
        return ir.passes.PassResult(model, bool(gone))
