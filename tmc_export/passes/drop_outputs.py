"""Take outputs out of a graph that one of its phases does not serve.

Before: every phase of a block returns `sums.<l>.<n>`. After: the decode graph does not, because no cut follows a generated token; what
computed them goes with the unused nodes.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes

__all__ = ["DropOutputsPass"]


class DropOutputsPass(ir.passes.InPlacePass):
    """Remove every output whose name begins with `prefix`."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any output went away."""
        gone = [value for value in model.graph.outputs if (value.name or "").startswith(self.prefix)]
        for value in gone:
            model.graph.outputs.remove(value)
        return ir.passes.PassResult(model, bool(gone))
