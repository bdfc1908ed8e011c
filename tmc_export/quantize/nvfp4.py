"""nvfp4, weight-only: E2M1 codes in blocks of 16 input channels, with an E4M3 scale per block and one scale per tensor.

Before: `MatMul(x, W [K, N])`. After: `MatMul(x, DequantizeLinear(Q float4e2m1 [K, N], DequantizeLinear(S float8e4m3fn [K/16, N], g),
axis=0, block_size=16))`, standard ONNX of opset 23, which TensorRT-RTX 1.7.1 parses and builds for SM120 and SM121.

`W[k, n] ≈ g · S[k // 16, n] · Q[k, n]`. E2M1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; rounding to the nearest, ties to even.
Of the block scales `max|w| / 6` and `max|w| / 4`, rounded to E4M3, each block takes the one with the least squared error: with 4 as the
top, the wide step from 4 to 6 is not used. `g = max|W| / (6 · 448)`, over all weights that read the same input, so that query, key and
value can be joined.

onnxruntime has no kernel for it. TensorRT-RTX widens the codes in a kernel of their own before the product (its log shows it): such
weights are small, and not read faster than float16 ones. Products of nvfp4 with nvfp4 need activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.core.errors import LegalityError, ModelError
from tmc_export.export.lazy_tensors import KeyedTensor, derive, key_of
from tmc_export.quantize._contract import SCHEMES, Applied, WeightPlan
from tmc_export.quantize._weights import is_kept, keyed, register, replace_input, shape_of, weight_name, weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BLOCK", "apply", "dequantize_nvfp4", "global_scale", "quantize_nvfp4"]

BLOCK = 16
"""Input channels that share a scale; TensorRT knows no other size."""
OPSET, IR_VERSION = 23, 11
"""What FLOAT4E2M1 needs."""

_TOP_CODE, _TOP_SCALE = 6.0, 448.0
_TOPS = (6.0, 4.0)
_LEAST_SCALE = 2.0**-9
"""The smallest positive E4M3 number: scales are never 0."""
_SLAB = 1 << 20
"""Weights worked on at a time, so that temporaries stay small beside the tensor."""
_PEAK = "tmc_export.nvfp4.peak"


def global_scale(peak: float, dtype: Any) -> Array:
    """Return `peak / (6 · 448)` as a scalar of a dtype, rounded up where it would be rounded down: no block scale is above 448.

    >>> float(global_scale(2688.0, np.float32))
    1.0
    """
    wanted = np.float32(peak) / np.float32(_TOP_CODE * _TOP_SCALE)
    least = max(float(np.finfo(dtype).smallest_subnormal), float(np.finfo(np.float32).tiny))  # times 2^-9, still above 0 in float32
    found = np.maximum(np.asarray(wanted, dtype), np.asarray(least, dtype))
    return np.asarray(np.nextafter(found, np.asarray(np.inf, dtype)) if np.float32(found) < wanted else found, dtype)


def quantize_nvfp4(weight: Array, scale: Array) -> tuple[Array, Array]:
    """Quantize a matrix.

    Args:
        weight: float `[K, N]`, K a multiple of 16.
        scale: of the tensor, above 0.

    Returns:
        E2M1 codes `[K, N]` and E4M3 block scales `[K / 16, N]` (`ml_dtypes`); codes are reckoned with the scales as stored.
    """
    import ml_dtypes

    rows, columns = weight.shape
    blocks = weight.reshape(rows // BLOCK, BLOCK, columns)
    codes = np.empty(blocks.shape, ml_dtypes.float4_e2m1fn)
    scales = np.empty((rows // BLOCK, columns), ml_dtypes.float8_e4m3fn)
    step = max(1, _SLAB // (BLOCK * columns))
    for start in range(0, len(blocks), step):
        slab = blocks[start : start + step].astype(np.float32)
        codes[start : start + step], scales[start : start + step] = _best(slab, np.float32(scale))
    return codes.reshape(rows, columns), scales


def _best(slab: Array, scale: np.float32) -> tuple[Array, Array]:
    """Codes `[m, 16, N]` and scales `[m, N]` of least squared error."""
    import ml_dtypes

    peak = np.abs(slab).max(1, keepdims=True)
    found: tuple[Array, Array, Array] | None = None
    for top in _TOPS:
        block = np.clip(peak / np.float32(top) / scale, _LEAST_SCALE, _TOP_SCALE).astype(ml_dtypes.float8_e4m3fn)
        wide = block.astype(np.float32) * scale
        codes = np.clip(slab / wide, -_TOP_CODE, _TOP_CODE).astype(ml_dtypes.float4_e2m1fn)
        error = np.square(codes.astype(np.float32) * wide - slab).sum(1, keepdims=True)
        if found is None:
            found = error, block, codes
            continue
        better = error < found[0]
        found = np.where(better, error, found[0]), np.where(better, block, found[1]), np.where(better, codes, found[2])
    if found is None:
        raise ValueError("no candidate scale")
    return found[2], found[1][:, 0]


def dequantize_nvfp4(codes: Array, scales: Array, scale: Array) -> Array:
    """Return `g · S[k // 16, n] · Q[k, n]` in float32."""
    wide: Array = np.repeat(scales.astype(np.float32) * np.float32(scale), BLOCK, axis=0)
    result: Array = codes.astype(np.float32) * wide
    return result


def _peak(source: KeyedTensor, name: str) -> float:
    """The largest magnitude of a weight; read once, however many graphs ask."""
    known = source.meta.get(_PEAK)
    if known is None:
        weight = source.numpy()
        known = float(np.maximum(weight.max(), -weight.min())) if weight.size else 0.0
        if not np.isfinite(known):
            word = name.removesuffix(".weight")
            raise ModelError(f"tensor '{name}' holds values that are not finite; leave it as it is with quantize.<part>.keep: [{word}]")
        source.meta[_PEAK] = known
    return float(known)


class _Pair:
    """Codes and block scales of one weight, computed together; the scales wait until they are asked for."""

    def __init__(self, scale: Callable[[], Array]) -> None:
        self.scale = scale
        self._scales: Array | None = None

    def codes(self, weight: Array) -> Array:
        found, self._scales = quantize_nvfp4(weight, self.scale())
        return found

    def scales(self, weight: Array) -> Array:
        waiting, self._scales = self._scales, None
        return quantize_nvfp4(weight, self.scale())[1] if waiting is None else waiting


def _group(model: ir.Model, values: Sequence[ir.Value]) -> None:
    """Add the scale that some weights share, and to each weight its codes, block scales and the two `DequantizeLinear`."""
    sources, names = [keyed(v) for v in values], [weight_name(v) for v in values]
    dtype, first = sources[0].dtype, values[0].name or ""

    def scale() -> Array:
        return global_scale(max(_peak(s, n) for s, n in zip(sources, names, strict=True)), dtype.numpy())

    members = "; ".join(sorted(key_of(s) for s in sources))
    shared = register(model, KeyedTensor(f"nvfp4.global({members})", lambda: ir.Tensor(scale(), dtype=dtype), dtype, (), f"{first}.global"))
    for value, source in zip(values, sources, strict=True):
        rows, columns = shape_of(source)
        name, pair, how = value.name or "", _Pair(scale), f"nvfp4({members})"
        codes = derive(source, how, pair.codes, shape=(rows, columns), name=f"{name}.nvfp4", dtype=ir.DataType.FLOAT4E2M1)
        blocks = (rows // BLOCK, columns)
        scales = derive(source, f"{how}.scale", pair.scales, shape=blocks, name=f"{name}.scale", dtype=ir.DataType.FLOAT8E4M3FN)
        inner = ir.node("DequantizeLinear", [register(model, scales), shared], name=f"{name}.dequantize_scale")
        outer = ir.node(
            "DequantizeLinear", [register(model, codes), inner.outputs[0]], attributes={"axis": 0, "block_size": BLOCK},
            name=f"{name}.dequantize",
        )  # fmt: skip
        for node, word, shape in ((inner, "scales", blocks), (outer, "dequantized", (rows, columns))):
            out = node.outputs[0]
            out.name, out.shape, out.type = f"{name}.{word}", ir.Shape(shape), ir.TensorType(dtype)
        users = [use.node for use in value.uses() if use.node.op_type == "MatMul" and use.idx == 1]
        model.graph.insert_before(next(node for node in model.graph if node in users), [inner, outer])
        replace_input(model, value, outer.outputs[0], users)


def apply(model: ir.Model, plan: WeightPlan, belongs: Callable[[str], bool]) -> Applied:
    """Store the part's linears in nvfp4; what is kept, and what no `MatMul` reads, stays as it is.

    Args:
        model: changed in place; its opset becomes 23.
        plan: keep.
        belongs: whether an initializer of that name is of the part.

    Raises:
        LegalityError: a linear's input channels are no multiple of 16.
    """
    groups: dict[int, dict[str, ir.Value]] = {}
    place: dict[str, int] = {}
    kept: dict[str, None] = {}
    for node, value in weights_of(model, {"MatMul": 1}, belongs):
        if is_kept(weight_name(value), plan.keep):
            kept[weight_name(value)] = None
            continue
        name = value.name or ""
        groups.setdefault(place.setdefault(name, id(node.inputs[0])), {})[name] = value
    found = [list(group.values()) for group in groups.values()]
    _check([value for group in found for value in group])
    for group in found:
        _group(model, group)
    if found:
        model.opset_imports[""] = max(model.opset_imports.get("") or 0, OPSET)
        model.ir_version = max(model.ir_version, IR_VERSION)
    return Applied(tuple(weight_name(value) for group in found for value in group), tuple(kept))


def _check(values: Sequence[ir.Value]) -> None:
    odd = {weight_name(v): rows for v in values if v.const_value is not None and (rows := shape_of(v.const_value)[0]) % BLOCK}
    if odd:
        name, rows = next(iter(odd.items()))
        words = ", ".join(sorted({n.split(".")[-2] if "." in n else n for n in odd}))
        raise LegalityError(
            f"weights: nvfp4 has blocks of {BLOCK}, which do not divide the {rows} input channels of '{name}' ({len(odd)} such linears "
            f"here); keep them in the base precision with keep: [{words}]"
        )


SCHEMES.register("nvfp4")(apply)
