"""Codes for what products multiply their weights with: one scale per tensor, found by calibration.

Before: `MatMul(x, W)`. After: `MatMul(DequantizeLinear(QuantizeLinear(x, s), s), W)`, where W is stored in codes already. Products that
read one input share the pair.

int8 is symmetric: codes in [-128, 127], no zero point. For onnxruntime's CPU kernels, which multiply unsigned with signed codes, the same
codes are written as uint8 with the zero point 128: every value is what it was. For the same runtime fp8 is two Casts between a
division and a product, `Mul(Cast(Cast(Div(x, s), E4M3), dtype), s)`: around a QuantizeLinear onnxruntime 1.31 makes operators that take
no fp8 (MatMulIntegerToFloat, or a Slice that it moves codes through), and then refuses the graph. nvfp4's codes have a scale per block
besides, which is found as the graph runs: `_fp4_inputs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.core.errors import RecipeError
from tmc_export.quantize._fp4_inputs import TOP, round_to_nvfp4
from tmc_export.quantize._weights import register

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["TOPS", "Product", "input_scale", "quantize_inputs"]

TOPS: Mapping[str, float] = {"int8": 127.0, "fp8": 448.0, "nvfp4": TOP}
"""Scheme → the largest code, of nvfp4 times the largest block scale; what calibration's range ends at."""

_CODES = {"int8": ir.DataType.INT8, "uint8": ir.DataType.UINT8, "fp8": ir.DataType.FLOAT8E4M3FN}
_UNSIGNED_ZERO = 128


@dataclass(frozen=True)
class Product:
    """A node that multiplies its first input with a weight.

    Attributes:
        node: a MatMul or Gemm.
        name: of its weight in the checkpoint.
    """

    node: ir.Node
    name: str


def input_scale(clip: float, top: float, dtype: Any) -> Array:
    """Return `clip / top` as a scalar of a dtype, above 0.

    >>> float(input_scale(254.0, 127.0, np.float32))
    2.0
    """
    least = np.finfo(dtype).smallest_normal
    return np.asarray(max(clip / top, float(least)), dtype)


def quantize_inputs(model: ir.Model, products: Sequence[Product], clips: Mapping[str, float], scheme: str, *, cpu: bool) -> None:
    """Round what products read.

    Args:
        model: changed in place.
        products: weights stored in codes already.
        clips: weight → the end of its input's range; those that read one input have one.
        scheme: `int8`, `fp8` or `nvfp4`.
        cpu: for onnxruntime's CPU path: int8 codes as uint8 around 128, fp8 by Casts.

    Raises:
        RecipeError: no sample reached one of the products.
    """
    made: dict[tuple[ir.Value, float], ir.Value] = {}
    for product in products:
        if product.name not in clips:
            raise RecipeError(
                f"quantize.calibration: no sample reached '{product.name}', so that the range of its input is not known; give samples that "
                "use it (with pictures, or longer), or name it in keep"
            )
        source = product.node.inputs[0]
        if source is None:
            raise ValueError(f"'{product.node.name}' has no input")
        place = source, clips[product.name]
        if place not in made:
            by_casts = cpu and scheme == "fp8"
            made[place] = (_casts if by_casts else _pair)(model, product, source, clips[product.name], scheme, cpu)
        product.node.replace_input_with(0, made[place])


def _pair(model: ir.Model, product: Product, source: ir.Value, clip: float, scheme: str, cpu: bool) -> ir.Value:
    """Put the rounding of its input before the product; returns what it gives."""
    if source.dtype is None:
        raise ValueError(f"'{source.name}' has no type")
    name = f"{source.name}.{len(source.uses())}"
    if scheme == "nvfp4":
        return round_to_nvfp4(model, product.node, source, clip, name)
    code = _CODES["uint8" if cpu and scheme == "int8" else scheme]
    zero = np.asarray(_UNSIGNED_ZERO if code == ir.DataType.UINT8 else 0).astype(code.numpy())
    scale = register(model, ir.tensor(input_scale(clip, TOPS[scheme], source.dtype.numpy()), name=f"{name}.scale"))
    point = register(model, ir.Tensor(zero, dtype=code, name=f"{name}.zero"))
    narrow = ir.node("QuantizeLinear", [source, scale, point], name=f"{name}.quantize")
    wide = ir.node("DequantizeLinear", [narrow.outputs[0], scale, point], name=f"{name}.dequantize")
    for node, word, kind in ((narrow, "codes", code), (wide, "rounded", source.dtype)):
        out = node.outputs[0]
        out.name, out.shape, out.type = f"{name}.{word}", source.shape, ir.TensorType(kind)
    model.graph.insert_before(product.node, [narrow, wide])
    return wide.outputs[0]


def _casts(model: ir.Model, product: Product, source: ir.Value, clip: float, scheme: str, _: bool) -> ir.Value:
    """Put `Mul(Cast(Cast(Div(source, s), codes), dtype), s)` before the product; returns what it gives. A Cast saturates, too."""
    if source.dtype is None:
        raise ValueError(f"'{source.name}' has no type")
    code, dtype = _CODES[scheme], source.dtype
    name = f"{source.name}.{len(source.uses())}"
    scale = register(model, ir.tensor(input_scale(clip, TOPS[scheme], dtype.numpy()), name=f"{name}.scale"))
    divide = ir.node("Div", [source, scale], name=f"{name}.divide")
    narrow = ir.node("Cast", [divide.outputs[0]], attributes={"to": code}, name=f"{name}.quantize")
    wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": dtype}, name=f"{name}.dequantize")
    multiply = ir.node("Mul", [wide.outputs[0], scale], name=f"{name}.multiply")
    nodes = [divide, narrow, wide, multiply]
    for node, word, kind in zip(nodes, ("divided", "codes", "wide", "rounded"), (dtype, code, dtype, dtype), strict=True):
        out = node.outputs[0]
        out.name, out.shape, out.type = f"{name}.{word}", source.shape, ir.TensorType(kind)
    model.graph.insert_before(product.node, nodes)
    return multiply.outputs[0]
