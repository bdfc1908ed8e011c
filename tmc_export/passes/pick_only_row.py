"""What picks a row along an axis that has one is the row itself.

Before, in a decode step: `Gather(GatherElements(hidden [1, 1, c], Expand(last)), 0) → [1, c]`, the row of the last token among one.
After: a Reshape, and the graph reads no `last`.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes

from tmc_export.passes._rewrite import replace, reshape, sizes

__all__ = ["PickOnlyRowPass"]


class PickOnlyRowPass(ir.passes.InPlacePass):
    """Replace every `GatherElements` and `Gather` along an axis of one that returns all there is. Shapes must be numbers.

    An index there can only be 0 (or -1, which is the same row).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether anything changed."""
        modified = any([_whole(model.graph, node) for node in list(model.graph)])
        return ir.passes.PassResult(model, modified)


def _whole(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a node that returns its whole input; say whether it did."""
    if node.op_type not in ("GatherElements", "Gather") or node.domain not in ("", "ai.onnx"):
        return False
    (source, index), out = node.inputs, node.outputs[0]
    before, picked, after = sizes(source), sizes(index), sizes(out)
    axis = node.attributes.get_int("axis", 0)
    if source is None or not before or picked is None or after is None or before[axis] != 1 or 0 in after:
        return False
    if node.op_type == "GatherElements" and picked == before and source.producer() is not None and not source.is_graph_output():
        replace(graph, node, source)
    elif node.op_type == "Gather" and picked == ():
        replace(graph, node, reshape(graph, node, source, after, "row"))
    else:
        return False
    return True
