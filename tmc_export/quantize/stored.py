"""Codes that the checkpoint brings: GPTQ's, AWQ's and compressed-tensors' go into the graphs as they are, nothing is rounded again.

Before: `MatMul(x, W [K, N])`, W the weight that the codes stand for. After: `MatMul(x, DequantizeLinear(Q [K, N], s, z))`.

- int4, and int8 in groups: `s [K/block, N]`, `axis=0`, `block_size=block`. A group of more input channels than a block is several blocks
  with one scale, which changes no number.
- int8 and fp8 per output channel: `s [N]`, `axis=1`.
- Without zero points (all of them are the middle of the codes) Q is int4 or int8 and z is left out; else Q and z are uint4 or uint8.

Where groups are scattered over the input channels (activation order), Q has the channels of a group in a row, and x is brought into that
order: `MatMul(Gather(x, order, axis=-1), …)`, one Gather for all products that read one x in one order.

onnxruntime multiplies 4-bit and 8-bit codes as they are, with zero points, too (its `MatMulNBits`). TensorRT-RTX reads signed codes, int8
in groups, too; it takes no zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from tmc_export.core.errors import ExportError
from tmc_export.export.lazy_tensors import KeyedTensor
from tmc_export.export.packed import PackedMatrix
from tmc_export.export.tensors import numpy_of, torch_dtype
from tmc_export.quantize._contract import Applied
from tmc_export.quantize._weights import keyed, register, replace_input, shape_of, weight_name, weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["apply_stored"]

_TYPES = {
    ("int4", False): ir.DataType.INT4, ("int4", True): ir.DataType.UINT4, ("int8", False): ir.DataType.INT8,
    ("int8", True): ir.DataType.UINT8, ("fp8", False): ir.DataType.FLOAT8E4M3FN,
}  # fmt: skip
"""Scheme, and whether it has zero points → the codes' type."""


def apply_stored(model: ir.Model, block: int, packed: Mapping[str, PackedMatrix], belongs: Callable[[str], bool]) -> Applied:
    """Make the part's products read the checkpoint's codes.

    Args:
        model: changed in place.
        block: input channels that share a scale in the graph; 0: a scale per output channel.
        packed: a weight's name in the checkpoint → its codes; other weights stay as they are.
        belongs: whether an initializer of that name is of the part.

    Raises:
        ExportError: a weight that is stored as codes is read in another way than a linear's is.
        ModelError: codes or zero points are not what config.json says.
    """
    readers: dict[str, tuple[ir.Value, list[ir.Node]]] = {}
    for node, value in weights_of(model, {"MatMul": 1}, belongs):
        if weight_name(value) in packed:
            readers.setdefault(value.name or "", (value, []))[1].append(node)
    ordered: dict[tuple[int, bytes], ir.Value] = {}
    for value, nodes in readers.values():
        matrix = packed[weight_name(value)]
        _check_form(value, matrix)
        _reorder(model, value, matrix.order(), nodes, ordered)
        node = _dequantize(model, value, matrix, block)
        model.graph.insert_before(nodes[0], node)
        replace_input(model, value, node.outputs[0], nodes)
    for value in model.graph.initializers.values():
        if belongs(value.name or "") and isinstance(value.const_value, KeyedTensor) and _dense(value, packed):
            raise ExportError(f"'{weight_name(value)}' is stored as codes and read by other nodes than a linear's product")
    return Applied(tuple(weight_name(value) for value, _ in readers.values()))


def _dense(value: ir.Value, packed: Mapping[str, PackedMatrix]) -> bool:
    """Whether an initializer holds the weight that codes stand for."""
    return weight_name(value) in packed and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and "|stored" not in keyed(value).key


def _check_form(value: ir.Value, matrix: PackedMatrix) -> None:
    """Codes are `[K, N]`: a product must read the model's `[N, K]` transposed, and as nothing else."""
    source = keyed(value)
    if source.key != f"{matrix.name}|transpose(1, 0)" or shape_of(source) != matrix.shape:
        raise ExportError(f"'{matrix.name}' is stored as codes and read as {source.key}, of shape {list(shape_of(source))}")


def _reorder(
    model: ir.Model, value: ir.Value, order: Array | None, nodes: list[ir.Node], ordered: dict[tuple[int, bytes], ir.Value]
) -> None:
    """Let products read their input with its channels in the order of the codes; `ordered` remembers which inputs were brought into it."""
    for node in nodes if order is not None else ():
        given = node.inputs[0]
        if given is None or order is None:
            continue
        key = id(given), order.tobytes()
        if key not in ordered:
            name = f"{value.name}.order"
            places = model.graph.initializers.get(name) or register(model, ir.tensor(order, name=name))
            gather = ir.node("Gather", [given, places], attributes={"axis": -1}, name=f"{node.name}.reorder")
            out = gather.outputs[0]
            out.name, out.shape, out.type = f"{given.name}.{value.name}.ordered", given.shape, given.type
            model.graph.insert_before(node, gather)
            ordered[key] = out
        node.replace_input_with(0, ordered[key])


def _dequantize(model: ir.Model, value: ir.Value, matrix: PackedMatrix, block: int) -> ir.Node:
    """Add codes, scales and zero points of one weight, and return the node that widens them."""
    source, name, (k, n) = keyed(value), value.name or "", matrix.shape
    zeros = matrix.zero_points()
    kind = _TYPES[matrix.scheme.weights, zeros is not None]
    shape = (k // block, n) if block else (n,)

    def tensor(what: str, load: Callable[[], Array], dtype: ir.DataType, size: tuple[int, ...]) -> ir.Value:
        def make() -> ir.TensorProtocol:
            return ir.Tensor(np.ascontiguousarray(load()), dtype=dtype, name=f"{name}.{what}")

        return register(model, KeyedTensor(f"{matrix.name}|stored {what} (block={block})", make, dtype, size, f"{name}.{what}"))

    def spread(each: Array) -> Array:
        return np.repeat(each, shape[0] // len(each), axis=0) if block else each.reshape(n)

    def again() -> Array:
        found = matrix.zero_points()
        return spread(np.zeros((1, n), np.uint8) if found is None else found)

    inputs = [
        tensor(matrix.scheme.weights, matrix.codes, kind, (k, n)),
        tensor("scale", lambda: spread(numpy_of(matrix.scales(torch_dtype(source.dtype)))), source.dtype, shape),
        *([tensor("zero_point", again, kind, shape)] if zeros is not None else []),
    ]
    how = {"axis": 0, "block_size": block} if block else {"axis": 1}
    node = ir.node("DequantizeLinear", inputs, attributes=how, name=f"{name}.dequantize")
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{name}.dequantized", ir.Shape((k, n)), ir.TensorType(source.dtype)
    return node
