"""int4, weight-only: blocks of input channels share a scale, rounding to the nearest, symmetric.

Before: `MatMul(x, W [K, N])`. After: `MatMul(x, DequantizeLinear(Q int4 [K, N], s [K/block, N], axis=0, block_size=block))`, standard
ONNX of opset 21. onnxruntime fuses the pair into its 4-bit kernel, TensorRT reads it as it is.

`W[k, n] ≈ s[k // block, n] · Q[k, n]`, with Q in [-8, 7] and no zero point. Of the scales `max|w| / 7`, `/ 8` and `/ 9` each block takes
the one with the least squared error: the largest weight may be clipped where that serves the others. On Gaussian weights that is worth
0.7 dB (block 32) to 1.2 dB (block 128) over `max|w| / 7`; finer steps would add 0.2 and 0.1 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.core.errors import ExportError, LegalityError
from tmc_export.export.lazy_tensors import derive
from tmc_export.quantize._contract import SCHEMES, Applied, WeightPlan
from tmc_export.quantize._divide import columns_times
from tmc_export.quantize._weights import is_kept, keyed, register, replace_input, shape_of, weight_name, weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["apply", "dequantize_blocks", "quantize_blocks"]

_DIVISORS = (7.0, 8.0, 9.0)
_SLAB = 1 << 20
"""Weights worked on at a time, so that temporaries stay small beside the tensor."""


def quantize_blocks(weight: Array, block: int) -> tuple[Array, Array]:
    """Quantize a matrix.

    Args:
        weight: float `[K, N]`, K a multiple of `block`.
        block: input channels that share a scale.

    Returns:
        int8 `[K, N]` in [-8, 7], and scales `[K / block, N]` of the weight's dtype; codes are reckoned with the scales as stored.
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows // block, block, columns)
    codes = np.empty(blocks.shape, np.int8)
    scales = np.empty((rows // block, columns), weight.dtype)
    step = max(1, _SLAB // (block * columns))
    for start in range(0, len(blocks), step):
        slab = blocks[start : start + step].astype(np.float32)
        codes[start : start + step], scales[start : start + step] = _best(slab, weight.dtype)
    return codes.reshape(rows, columns), scales


def _best(slab: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Codes `[m, block, N]` and scales `[m, N]` of least squared error; a block of zeros gets codes 0."""
    peak = np.abs(slab).max(1, keepdims=True)
    least = np.finfo(dtype).smallest_subnormal
    best_error = best_scale = best_codes = None
    for divisor in _DIVISORS:
        scale = np.maximum((peak / divisor).astype(dtype), least)
        wide = scale.astype(np.float32)
        codes = np.clip(np.rint(slab / wide), -8, 7)
        error = np.square(codes * wide - slab).sum(1, keepdims=True)
        if best_error is None or best_scale is None or best_codes is None:
            best_error, best_scale, best_codes = error, scale, codes
            continue
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_codes = np.where(better, codes, best_codes)
    if best_scale is None or best_codes is None:
        raise ValueError("no candidate scale")
    return best_codes.astype(np.int8), best_scale[:, 0]


def dequantize_blocks(codes: Array, scales: Array) -> Array:
    """Return `scales[k // block, n] · codes[k, n]` in the scales' dtype: what `DequantizeLinear` computes.

    >>> dequantize_blocks(np.array([[-8], [7]], np.int8), np.array([[0.5]], np.float32)).tolist()
    [[-4.0], [3.5]]
    """
    block = codes.shape[0] // scales.shape[0]
    result: Array = codes.astype(scales.dtype) * np.repeat(scales, block, axis=0)
    return result


class _Pair:
    """Codes and scales of one weight, computed together; the scales wait until they are asked for."""

    how = "int4"

    def __init__(self, block: int) -> None:
        self.block = block
        self._scales: Array | None = None

    def codes(self, weight: Array) -> Array:
        found, self._scales = quantize_blocks(weight, self.block)
        return found

    def scales(self, weight: Array) -> Array:
        waiting, self._scales = self._scales, None
        return quantize_blocks(weight, self.block)[1] if waiting is None else waiting


class _Chosen:
    """Codes and scales that are known already; where the weight's columns were multiplied since, so are the scales."""

    how = "chosen"

    def __init__(self, codes: Array, scales: Array, columns: Array | None) -> None:
        self._codes, self._scales = codes, scales if columns is None else scales * columns

    def codes(self, _: Array) -> Array:
        return self._codes

    def scales(self, weight: Array) -> Array:
        return self._scales.astype(weight.dtype)


def _dequantize(model: ir.Model, value: ir.Value, block: int, chosen: tuple[Array, Array] | None) -> ir.Value:
    """Add codes, scales and a `DequantizeLinear` for one weight; the node is put where the weight is read first."""
    source = keyed(value)
    rows, columns = shape_of(source)
    name = value.name or ""
    pair = _Pair(block) if chosen is None else _Chosen(*chosen, columns_times(source))
    codes = derive(source, f"{pair.how}(block={block})", pair.codes, shape=(rows, columns), name=f"{name}.int4", dtype=ir.DataType.INT4)
    scales = derive(source, f"{pair.how}_scale(block={block})", pair.scales, shape=(rows // block, columns), name=f"{name}.scale")
    inputs = [register(model, tensor) for tensor in (codes, scales)]
    node = ir.node("DequantizeLinear", inputs, attributes={"axis": 0, "block_size": block}, name=f"{name}.dequantize")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{name}.dequantized", ir.Shape((rows, columns)), ir.TensorType(source.dtype)
    return out


def apply(
    model: ir.Model,
    plan: WeightPlan,
    belongs: Callable[[str], bool],
    chosen: Mapping[str, tuple[Array, Array]] = MappingProxyType({}),
) -> Applied:
    """Store the part's linears as int4 blocks; what is kept stays as it is.

    Args:
        model: changed in place.
        plan: block and keep.
        belongs: whether an initializer of that name is of the part.
        chosen: weight → codes and scales that calibration found, as `quantize_blocks` returns them; the others are rounded.

    Raises:
        LegalityError: a linear's input channels are no multiple of the block.
        ExportError: a linear is read in a way that this scheme does not know.
    """
    readers: dict[str, tuple[ir.Value, list[ir.Node]]] = {}
    kept: dict[str, None] = {}
    for node, value in weights_of(model, {"MatMul": 1}, belongs):
        if is_kept(weight_name(value), plan.keep):
            kept[weight_name(value)] = None
        else:
            readers.setdefault(value.name or "", (value, []))[1].append(node)
    _check(readers, plan.block)
    changed = []
    for value, nodes in readers.values():
        changed.append(weight_name(value))
        new = _dequantize(model, value, plan.block, chosen.get(weight_name(value)))
        producer = new.producer()
        if producer is not None:
            model.graph.insert_before(nodes[0], producer)
        replace_input(model, value, new, nodes)
    for node, value in weights_of(model, {"Gemm": 1, "Gather": 0}, belongs):
        if not is_kept(weight_name(value), plan.keep):
            raise ExportError(
                f"int4: '{weight_name(value)}' is read by {node.op_type}, and only MatMul is known; write it in quantize.decoder.keep"
            )
    return Applied(tuple(changed), tuple(kept))


def _check(readers: dict[str, tuple[ir.Value, list[ir.Node]]], block: int) -> None:
    channels_of = {weight_name(v): shape_of(v.const_value)[0] for v, _ in readers.values() if v.const_value is not None}
    odd = {name: channels for name, channels in channels_of.items() if channels % block}
    if not odd:
        return
    name, channels = next(iter(odd.items()))
    serve = [b for b in (128, 64, 32) if all(k % b == 0 for k in odd.values()) and b < block]
    fix = f"use block: {serve[0]}, or keep" if serve else "keep"
    words = ", ".join(sorted({n.split(".")[-2] if "." in n else n for n in odd}))
    raise LegalityError(
        f"block: {block} does not divide the {channels} input channels of '{name}' ({len(odd)} such linears here); "
        f"{fix} them in the base precision with keep: [{words}]"
    )


SCHEMES.register("int4")(apply)
