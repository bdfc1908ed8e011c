"""fp16, weight-only: matrices of a float32 graph are stored in half the bytes and widened when they are read.

Before: `MatMul(x, W float [K, N])`. After: `MatMul(x, Cast(W float16 [K, N], to=float))`; a look-up `Gather(W, i)` widens the rows it
found. The arithmetic stays float32. A graph traced in
float16 (`model.dtype: float16`) has such weights already and is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.core.errors import ModelError
from tmc_export.export.lazy_tensors import derive
from tmc_export.quantize._contract import SCHEMES, Applied, WeightPlan
from tmc_export.quantize._weights import is_kept, keyed, replace_input, shape_of, weight_name, weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["apply", "to_half"]

_READERS = {"MatMul": 1, "Gemm": 1, "Gather": 0}


def to_half(name: str, weight: Array) -> Array:
    """Round to float16.

    Raises:
        ModelError: a value is above float16's range, or not a number.
    """
    peak = float(np.abs(weight).max()) if weight.size else 0.0
    if not peak <= float(np.finfo(np.float16).max):
        word = name.removesuffix(".weight")
        raise ModelError(f"tensor '{name}' holds {peak:g}, above float16's 65504; leave it in float32 with quantize.<part>.keep: [{word}]")
    return weight.astype(np.float16)


def _store(model: ir.Model, value: ir.Value) -> ir.Value:
    """Add the float16 weight."""
    source, label = keyed(value), weight_name(value)
    shape, name = shape_of(source), f"{value.name}.fp16"
    half = derive(source, "float16", lambda weight: to_half(label, weight), shape=shape, name=name, dtype=ir.DataType.FLOAT16)
    stored = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(half.dtype), const_value=half)
    model.graph.register_initializer(stored)
    return stored


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(to)}, name=f"{name}.widen")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{name}.widened", value.shape, ir.TensorType(to)
    return node


def _rewrite(model: ir.Model, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Make `nodes` read the float16 weight: a product through one Cast of the weight, a look-up with a Cast of its rows."""
    stored, name = _store(model, value), value.name or ""
    products = [n for n in nodes if n.op_type != "Gather"]
    if products:
        cast = _cast(stored, ir.DataType.FLOAT, name)
        model.graph.insert_before(products[0], cast)
        replace_input(model, value, cast.outputs[0], products)
    for node in nodes:
        if node.op_type != "Gather":
            continue
        rows = node.outputs[0]
        was_output, row_name = rows.is_graph_output(), rows.name or ""
        replace_input(model, value, stored, [node])
        rows.type = ir.TensorType(ir.DataType.FLOAT16)
        cast = _cast(rows, ir.DataType.FLOAT, row_name)
        model.graph.insert_after(node, cast)
        rows.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, rows)
        if was_output:
            rows.name, cast.outputs[0].name = f"{row_name}.fp16", row_name


def apply(model: ir.Model, plan: WeightPlan, belongs: Callable[[str], bool]) -> Applied:
    """Store the part's matrices as float16.

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
        _rewrite(model, value, nodes)
    return Applied(tuple(changed), tuple(kept))


SCHEMES.register("fp16")(apply)
