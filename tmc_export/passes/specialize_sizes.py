"""Give every symbolic dimension its number.

Before: inputs such as `hidden [1, T, 896]`, `past_key_values.0.key [1, 2, P, 64]`. After: `[1, 640, 896]`, `[1, 2, 0, 64]`; shapes computed
in the graph are folded to constants afterwards by the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes

__all__ = ["SpecializeSizesPass"]


class SpecializeSizesPass(ir.passes.InPlacePass):
    """Replace symbols in the inputs' shapes, and forget inferred shapes that mention any.

    Args:
        sizes: symbol → number; a symbol without one stays.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = dict(sizes)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite shapes; `modified` says whether any symbol was replaced."""
        modified = False
        inputs = set(model.graph.inputs)
        values = [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
        for value in values:
            if value.shape is None or value.shape.is_static():
                continue
            dims = [self.sizes.get(str(d.value), d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            known = all(isinstance(d, int) for d in dims)
            value.shape = ir.Shape(dims) if known or value in inputs or value.is_graph_output() else None
            modified = True
        return ir.passes.PassResult(model, modified)
