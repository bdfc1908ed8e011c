"""Channels of an input divided, the rows of its weights multiplied: `x W = (x / d) (d W)`, d a number per input channel.

What SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, equation 3) and AWQ (Lin et al. 2024, arXiv 2306.00978, equation 2) do before they
round. The division costs nothing where the numbers before it can take it: the gain (and bias) of the norm that makes x, or the columns of
the linear whose product x is a factor of (`up_proj` before `down_proj`). Elsewhere it is a `Mul`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.export.lazy_tensors import derive
from tmc_export.quantize._inputs import Product
from tmc_export.quantize._weights import keyed, register, replace_input, shape_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["columns_times", "divide_inputs"]

_COLUMNS = "tmc_export.columns"


def columns_times(tensor: ir.TensorProtocol) -> Array | None:
    """What the last axis of a weight was multiplied by to divide another product's input; None when by nothing."""
    found: Array | None = tensor.meta.get(_COLUMNS)
    return found


def divide_inputs(model: ir.Model, products: Sequence[Product], divisors: Mapping[str, Array]) -> None:
    """Divide what products read and multiply their weights' rows; a product without divisors stays as it is.

    Args:
        model: changed in place; weights stay lazy, and keep their names in the checkpoint.
        products: weights `[K, N]` of `MatMul`, not yet in codes.
        divisors: weight → `[K]`, above 0; those that read one input have the same array.
    """
    groups: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    for product in products:
        source = product.node.inputs[0]
        if source is not None and product.name in divisors:
            groups.setdefault((source, id(divisors[product.name])), []).append(product.node)
    found = {id(array): array.astype(np.float64) for array in divisors.values()}
    for (source, which), nodes in groups.items():
        for weight in dict.fromkeys(node.inputs[1] for node in nodes):
            if weight is not None:
                _scale(model, weight, found[which], nodes, axis=0)
        _divide(model, source, found[which], nodes)


def _divide(model: ir.Model, source: ir.Value, divisor: Array, users: list[ir.Node]) -> None:
    """Divide a value for its users: in the numbers that make it, where nobody else reads it, or by a node."""
    stored = _stored_behind(source) if {use.node for use in source.uses()} == set(users) and not source.is_graph_output() else None
    for value in stored or ():
        _scale(model, value, 1 / divisor, [use.node for use in value.uses()], axis=-1)
    if stored is not None:
        return
    if source.dtype is None:
        raise ValueError(f"'{source.name}' has no type")
    reads = users[0].inputs[1]
    name = f"{source.name}.{'' if reads is None else reads.name}"
    factor = register(model, ir.tensor((1 / divisor).astype(source.dtype.numpy()), name=f"{name}.factors"))
    node = ir.node("Mul", [source, factor], name=f"{name}.divide")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{name}.divided", source.shape, ir.TensorType(source.dtype)
    model.graph.insert_before(users[0], node)
    for user in users:
        user.replace_input_with(0, out)


def _stored_behind(value: ir.Value) -> list[ir.Value] | None:
    """The stored numbers that a value's channels are multiples of, together; None where there are none.

    The last axis of each is the channels.
    """
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    first, second = [*node.inputs, None][:2]
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        found = [v for v in node.inputs[1:] if v is not None]
        return found if all(_own(v) for v in found) else None
    if node.op_type == "MatMul":
        return [second] if second is not None and _own(second) else None
    if node.op_type == "Mul":
        gain = next((v for v in (first, second) if v is not None and _own(v) and _width(v) == _width(value)), None)
        return [gain] if gain is not None else next((f for v in (second, first) if (f := _alone(v)) is not None), None)
    if node.op_type == "Add":
        for bias, rest in ((first, second), (second, first)):
            if bias is not None and _own(bias) and _width(bias) == _width(value) and (behind := _alone(rest)) is not None:
                return [bias, *behind]
    return None


def _alone(value: ir.Value | None) -> list[ir.Value] | None:
    """As `_stored_behind`, of a value that one node reads."""
    return None if value is None or len(value.uses()) != 1 or value.is_graph_output() else _stored_behind(value)


def _own(value: ir.Value) -> bool:
    """Whether a value is stored and one node reads it."""
    return value.is_initializer() and value.const_value is not None and len(value.uses()) == 1


def _width(value: ir.Value) -> int | None:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def _scale(model: ir.Model, value: ir.Value, factor: Array, users: list[ir.Node], axis: int) -> None:
    """Make `users` read a stored tensor times one number per entry of an axis (the first or the last)."""
    source = keyed(value)
    shape = shape_of(source)
    wide = factor.reshape([-1, *[1] * (len(shape) - 1)]) if axis == 0 else factor
    how = f"times({axis}, {hashlib.sha256(np.ascontiguousarray(factor).tobytes()).hexdigest()})"
    narrow = wide.astype(np.float32)
    scaled = derive(source, how, lambda w: (w.astype(np.float32) * narrow).astype(w.dtype), shape=shape, name=f"{value.name}.t")
    before = columns_times(source)
    if axis == -1:
        before = narrow if before is None else before * narrow
    if before is not None:
        scaled.meta[_COLUMNS] = before
    replace_input(model, value, register(model, scaled), users)
