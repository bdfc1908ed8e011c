"""Matrices of a float32 graph in a narrower floating point, widened when they are read: what fp16 and bf16 share.

Before: `MatMul(x, W float [K, N])`. After: `MatMul(x, Cast(W narrow [K, N], to=float))`; a look-up `Gather(W, i)` widens the rows it
found. The arithmetic stays float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from tmc_export.export.lazy_tensors import derive
from tmc_export.quantize._contract import Applied, WeightPlan
from tmc_export.quantize._weights import is_kept, keyed, register, replace_input, shape_of, weight_name, weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["NarrowScheme"]

_READERS = {"MatMul": 1, "Gemm": 1, "Gather": 0}


@dataclass(frozen=True)
class NarrowScheme:
    """A narrower floating point.

    Attributes:
        name: of the scheme.
        how: part of the key of what is derived.
        dtype: of the stored weights.
        round: name in the checkpoint and float32 weights → narrow ones; refuses what they cannot hold.
    """

    name: str
    how: str
    dtype: ir.DataType
    round: Callable[[str, Array], Array]

    def apply(self, model: ir.Model, plan: WeightPlan, belongs: Callable[[str], bool]) -> Applied:
        """Store the part's float32 matrices in the narrow type.

        Args:
            model: changed in place; static, so that nothing folds the Casts away afterwards.
            plan: keep.
            belongs: whether an initializer of that name is of the part.
        """
        readers: dict[str, tuple[ir.Value, list[ir.Node]]] = {}
        changed: dict[str, None] = {}
        kept: dict[str, None] = {}
        for node, value in weights_of(model, _READERS, belongs):
            name = weight_name(value)
            if is_kept(name, plan.keep):
                kept[name] = None
                continue
            changed[name] = None
            if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                readers.setdefault(value.name or "", (value, []))[1].append(node)
        for value, nodes in readers.values():
            self._rewrite(model, value, nodes)
        return Applied(tuple(changed), tuple(kept))

    def _rewrite(self, model: ir.Model, value: ir.Value, nodes: list[ir.Node]) -> None:
        """Make `nodes` read the narrow weight: a product through one Cast of the weight, a look-up with a Cast of its rows."""
        source, label, name = keyed(value), weight_name(value), value.name or ""
        narrow = derive(
            source, self.how, lambda weight: self.round(label, weight), shape=shape_of(source), name=f"{name}.{self.name}", dtype=self.dtype
        )
        stored = register(model, narrow)
        products = [n for n in nodes if n.op_type != "Gather"]
        if products:
            cast = _widen(stored, name)
            model.graph.insert_before(products[0], cast)
            replace_input(model, value, cast.outputs[0], products)
        for node in nodes:
            if node.op_type == "Gather":
                self._look_up(model, node, value, stored)

    def _look_up(self, model: ir.Model, node: ir.Node, value: ir.Value, stored: ir.Value) -> None:
        rows = node.outputs[0]
        was_output, row_name = rows.is_graph_output(), rows.name or ""
        replace_input(model, value, stored, [node])
        rows.type = ir.TensorType(self.dtype)
        cast = _widen(rows, row_name)
        model.graph.insert_after(node, cast)
        rows.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, rows)
        if was_output:
            rows.name, cast.outputs[0].name = f"{row_name}.{self.name}", row_name


def _widen(value: ir.Value, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}.widen")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{name}.widened", value.shape, ir.TensorType(ir.DataType.FLOAT)
    return node
