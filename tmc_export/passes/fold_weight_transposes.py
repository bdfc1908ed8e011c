"""Store a weight the way its MatMul reads it.

Before: `MatMul(x, Transpose(W))` with `W [out, in]`. After: `MatMul(x, Wᵀ)` with `Wᵀ [in, out]`, transposed while it is streamed to disk.
A convolution's kernel that is read as a matrix (`Transpose(Reshape(W))`, Qwen's patch embedding) is reshaped there, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience
import onnx_ir.passes

from tmc_export.export.lazy_tensors import derive
from tmc_export.passes._rewrite import made_by

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FoldWeightTransposesPass"]


class FoldWeightTransposesPass(ir.passes.InPlacePass):
    """Replace every Transpose of an initializer, and every Reshape of one of more than two axes to a matrix, by another initializer."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; `modified` says whether any node went away."""
        modified = False
        for node in list(model.graph):
            source = node.inputs[0] if node.inputs and node.domain in ("", "ai.onnx") else None
            if source is None or not source.is_initializer() or source.const_value is None or source.is_graph_output():
                continue
            sizes = tuple(int(d) for d in source.const_value.shape.numpy())
            if node.op_type == "Transpose":
                order = tuple(node.attributes.get_ints("perm", list(reversed(range(len(sizes))))))
                shape, how = tuple(sizes[axis] for axis in order), f"transpose{order}"
                _store(model.graph, node, source, partial(np.transpose, axes=order), how, shape, f"transposed_{''.join(map(str, order))}")
            elif node.op_type == "Reshape" and len(sizes) > 2 and (matrix := _matrix(node, sizes)) is not None:
                _store(model.graph, node, source, partial(np.reshape, shape=matrix), f"reshape{matrix}", matrix, "as_matrix")
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified)


def _matrix(node: ir.Node, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The two sizes that a Reshape gives; None where they are not known or not two."""
    given = _numbers(node.inputs[1] if len(node.inputs) > 1 else None)
    if given is None or len(given) != 2 or 0 in given or given == [-1, -1]:
        return None
    total = int(np.prod(sizes))
    return tuple(total // -(given[0] * given[1]) if n < 0 else n for n in given)


def _numbers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant, or of several that are put behind each other; None where they are not known."""
    if value is None:
        return None
    parts = made.inputs if (made := made_by(value, "Concat")) is not None else [value]
    found = [None if part is None else ir.convenience.get_const_tensor(part) for part in parts]
    return None if any(part is None for part in found) else [int(n) for part in found if part is not None for n in part.numpy().reshape(-1)]


def _store(
    graph: ir.Graph,
    node: ir.Node,
    source: ir.Value,
    function: Callable[[NDArray[Any]], NDArray[Any]],
    how: str,
    shape: tuple[int, ...],
    suffix: str,
) -> None:
    """Let what reads a node read an initializer that is computed from the node's."""
    name = f"{source.name}.{suffix}"
    if name not in graph.initializers and source.const_value is not None:
        tensor = derive(source.const_value, how, function, shape=shape, name=name)
        graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    node.outputs[0].replace_all_uses_with(graph.initializers[name])
    graph.remove(node, safe=True)
    if not source.uses():
        del graph.initializers[source.name or ""]
