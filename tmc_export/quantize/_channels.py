"""Weights with one scale per output channel: what int8 and fp8 share.

Before: `MatMul(x, W [K, N])`. After: `MatMul(x, DequantizeLinear(Q [K, N], s [N], axis=1))`. A `Gemm` or `Conv` has its output channels
on another axis, and its weight stays as it lies, so that a tied table is stored once. A look-up reads codes and scales of its rows:
`Gather(W, i)` becomes `Cast(Gather(Q, i)) · Unsqueeze(Gather(s, i))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.core.errors import ExportError, ModelError
from tmc_export.export.lazy_tensors import derive
from tmc_export.quantize._contract import Applied, WeightPlan
from tmc_export.quantize._weights import is_kept, keyed, register, replace_input, shape_of, weight_name, weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["ChannelScheme", "channel_scales", "quantize_channels"]

_READERS = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}
_SLAB = 1 << 20
"""Weights worked on at a time, so that temporaries stay small beside the tensor."""


@dataclass(frozen=True)
class ChannelScheme:
    """A code for weights.

    Attributes:
        name: of the scheme.
        dtype: of the codes.
        top: the largest code.
        code: weights divided by their scale, within ±top → codes.
        reads: operators that may read such codes, of those that read weights; what others read stays in the base precision.
    """

    name: str
    dtype: ir.DataType
    top: float
    code: Callable[[Array], Array]
    reads: frozenset[str]

    def apply(self, model: ir.Model, plan: WeightPlan, belongs: Callable[[str], bool]) -> Applied:
        """Store the part's weights as codes and scales; what is kept stays as it is.

        Args:
            model: changed in place.
            plan: keep.
            belongs: whether an initializer of that name is of the part.

        Raises:
            ExportError: two nodes read a weight with its output channels on different axes.
        """
        readers: dict[str, tuple[ir.Value, list[ir.Node]]] = {}
        kept: dict[str, None] = {}
        for node, value in weights_of(model, {name: place for name, place in _READERS.items() if name in self.reads}, belongs):
            if is_kept(weight_name(value), plan.keep):
                kept[weight_name(value)] = None
            else:
                readers.setdefault(value.name or "", (value, []))[1].append(node)
        for value, nodes in readers.values():
            self._rewrite(model, value, nodes)
        return Applied(tuple(weight_name(value) for value, _ in readers.values()), tuple(kept))

    def _rewrite(self, model: ir.Model, value: ir.Value, nodes: list[ir.Node]) -> None:
        axes = {_channel_axis(node) for node in nodes}
        if len(axes) != 1:
            raise ExportError(f"{self.name}: '{weight_name(value)}' is read with its output channels on axes {sorted(axes)}; keep it")
        (axis,) = axes
        codes, scales = self._store(model, value, axis)
        products = [node for node in nodes if node.op_type != "Gather"]
        if products:
            node = ir.node("DequantizeLinear", [codes, scales], attributes={"axis": axis}, name=f"{value.name}.dequantize")
            out = node.outputs[0]
            out.name, out.shape, out.type = f"{value.name}.dequantized", value.shape, ir.TensorType(_dtype(value))
            model.graph.insert_before(products[0], node)
            replace_input(model, value, out, products)
        for node in nodes:
            if node.op_type == "Gather":
                _look_up(model, node, value, codes, scales)

    def _store(self, model: ir.Model, value: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
        source, pair = keyed(value), _Pair(self, axis, weight_name(value))
        shape, how = shape_of(source), f"{self.name}(axis={axis})"
        codes = derive(source, how, pair.codes, shape=shape, name=f"{value.name}.{self.name}", dtype=self.dtype)
        scales = derive(source, f"{how}.scale", pair.scales, shape=(shape[axis],), name=f"{value.name}.scale")
        return register(model, codes), register(model, scales)


class _Pair:
    """Codes and scales of one weight, computed together; the scales wait until they are asked for."""

    def __init__(self, scheme: ChannelScheme, axis: int, name: str) -> None:
        self.scheme, self.axis, self.name = scheme, axis, name
        self._scales: Array | None = None

    def codes(self, weight: Array) -> Array:
        self._scales = self._check(channel_scales(weight, self.axis, self.scheme.top))
        return quantize_channels(weight, self._scales, self.axis, self.scheme)

    def scales(self, weight: Array) -> Array:
        waiting, self._scales = self._scales, None
        return self._check(channel_scales(weight, self.axis, self.scheme.top)) if waiting is None else waiting

    def _check(self, scales: Array) -> Array:
        if np.isfinite(scales).all():
            return scales
        word = self.name.removesuffix(".weight")
        raise ModelError(f"tensor '{self.name}' holds values that are not finite; leave it as it is with quantize.<part>.keep: [{word}]")


def channel_scales(weight: Array, axis: int, top: float) -> Array:
    """Return `max|w| / top` of each channel in the weight's dtype.

    A scale that is rounded down by more than 2^-9, as only the smallest numbers of float16 are, is rounded up instead: the largest weight
    would be clipped.

    Args:
        weight: float, any rank.
        axis: of the channels.
        top: the largest code.

    Returns:
        `[channels]`, all above 0: a channel of zeros has the smallest positive number.
    """
    rest = tuple(i for i in range(weight.ndim) if i != axis)
    peak = np.maximum(weight.max(rest), -weight.min(rest)).astype(np.float32)
    scales = np.maximum((peak / np.float32(top)).astype(weight.dtype), np.finfo(weight.dtype).smallest_subnormal)
    over = scales.astype(np.float32) * np.float32(top * (1 + 2.0**-9)) < peak
    result: Array = np.where(over, np.nextafter(scales, weight.dtype.type(np.inf)), scales)
    return result


def quantize_channels(weight: Array, scales: Array, axis: int, scheme: ChannelScheme) -> Array:
    """Return the codes of a weight, slab by slab along its first axis; they are reckoned with the scales as stored."""
    wide = scales.astype(np.float32).reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    step = max(1, _SLAB * len(weight) // max(1, weight.size))
    parts = []
    for start in range(0, len(weight), step):
        scale = wide[start : start + step] if axis == 0 else wide
        parts.append(scheme.code(np.clip(weight[start : start + step].astype(np.float32) / scale, -scheme.top, scheme.top)))
    return np.concatenate(parts)


def _channel_axis(node: ir.Node) -> int:
    """The axis of the output channels in the weight that a node reads; of a table's rows, which are the channels of a tied head."""
    axis, transposed = (int(node.attributes.get_int(name, 0)) for name in ("axis", "transB"))
    if node.op_type == "Gather" and axis:
        raise ExportError(f"'{node.name}' looks columns up, and only rows have scales of their own; keep the weight")
    if node.op_type == "MatMul":
        return 1
    return 0 if node.op_type in ("Conv", "Gather") or transposed else 1


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ValueError(f"'{value.name}' has no type")
    return value.dtype


def _look_up(model: ir.Model, node: ir.Node, value: ir.Value, codes: ir.Value, scales: ir.Value) -> None:
    """Put `Cast(Gather(Q, i)) · Unsqueeze(Gather(s, i))` in the place of `Gather(W, i)`, under its output's name."""
    found, dtype, name = node.outputs[0], _dtype(value), node.outputs[0].name or ""
    rows = ir.node("Gather", [codes, node.inputs[1]], attributes={"axis": 0})
    factors = ir.node("Gather", [scales, node.inputs[1]], attributes={"axis": 0})
    last = register(model, ir.tensor(np.array([-1]), name=f"{name}.last"))
    wide = ir.node("Cast", [rows.outputs[0]], attributes={"to": int(dtype)})
    column = ir.node("Unsqueeze", [factors.outputs[0], last])
    product = ir.node("Mul", [wide.outputs[0], column.outputs[0]])
    lead = [] if found.shape is None else list(found.shape)[:-1]
    for made, word, shape, kind in (
        (rows, "codes", found.shape, _dtype(codes)), (factors, "factors", ir.Shape(lead), dtype), (wide, "wide", found.shape, dtype),
        (column, "column", ir.Shape([*lead, 1]), dtype), (product, "product", found.shape, dtype),
    ):  # fmt: skip
        out = made.outputs[0]
        out.name, out.shape, out.type = f"{name}.{word}", shape, ir.TensorType(kind)
    model.graph.insert_after(node, [rows, factors, wide, column, product])
    found.replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
    found.name, product.outputs[0].name = f"{name}.base", name
    model.graph.remove(node, safe=True)
    if not value.uses() and not value.is_graph_output():
        del model.graph.initializers[value.name or ""]
