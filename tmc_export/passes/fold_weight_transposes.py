"""Store a weight the way its MatMul reads it.

Before: `MatMul(x, Transpose(W))` with `W [out, in]`. After: `MatMul(x, Wᵀ)` with `Wᵀ [in, out]`, transposed while it is streamed to disk.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from tmc_export.export.lazy_tensors import derive

__all__ = ["FoldWeightTransposesPass"]


class FoldWeightTransposesPass(ir.passes.InPlacePass):
    """Replace every Transpose of an initializer by a transposed initializer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any Transpose went away."""
        graph, modified = model.graph, False
        for node in list(graph):
            if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
                continue
            source = node.inputs[0]
            if source is None or not source.is_initializer() or source.const_value is None or source.is_graph_output():
                continue
            rank = len(source.const_value.shape)
            order = tuple(node.attributes.get_ints("perm", list(reversed(range(rank)))))
            sizes = source.const_value.shape.numpy()
            shape = tuple(int(sizes[axis]) for axis in order)
            name = f"{source.name}.transposed_{''.join(map(str, order))}"
            out = node.outputs[0]
            if name not in graph.initializers:
                tensor = derive(source.const_value, f"transpose{order}", partial(np.transpose, axes=order), shape=shape, name=name)
                graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            out.replace_all_uses_with(graph.initializers[name])
            graph.remove(node, safe=True)
            if not source.uses():
                del graph.initializers[source.name or ""]
            modified = True
        return ir.passes.PassResult(model, modified)
