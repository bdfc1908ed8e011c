"""Finding the weights of a graph, their names in the checkpoint, and a place for what is derived from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import onnx_ir as ir

from tmc_export.core.errors import LegalityError
from tmc_export.core.registry import nearest
from tmc_export.export.lazy_tensors import KeyedTensor

__all__ = ["check_keep", "is_kept", "keyed", "register", "replace_input", "shape_of", "weight_name", "weights_of"]


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The tensor's shape as numbers; a stored tensor has no others."""
    return tuple(d for d in tensor.shape if isinstance(d, int))


def weight_name(value: ir.Value) -> str:
    """The weight's name in the checkpoint (`language_model.layers.2.mlp.up_proj.weight`), or in the graph where it has none there."""
    tensor = value.const_value
    key = tensor.key if isinstance(tensor, KeyedTensor) else value.name or ""
    return key.split("|")[0]


def is_kept(name: str, keep: tuple[str, ...]) -> bool:
    """Whether `keep` names a weight: whole words between dots, in a row.

    >>> is_kept("model.layers.1.mlp.down_proj.weight", ("layers.1",)), is_kept("model.layers.11.mlp.down_proj.weight", ("layers.1",))
    (True, False)
    """
    return any(f".{k.strip('.')}." in f".{name}." for k in keep)


def check_keep(part: str, keep: tuple[str, ...], names: list[str]) -> None:
    """Refuse a `keep` that keeps nothing.

    Args:
        part: of the recipe, for the message.
        keep: as the recipe says.
        names: the part's weights in the checkpoint.

    Raises:
        LegalityError: naming the word and the nearest that exists.
    """
    for word in keep:
        if any(is_kept(name, (word,)) for name in names):
            continue
        words = sorted({w for name in names for w in name.split(".") if not w.isdigit()} | {n.removesuffix(".weight") for n in names})
        example = f"; weights here are called like '{names[-1]}'" if names else ""
        raise LegalityError(f"quantize.{part}.keep: '{word}' names no weight of the {part}{nearest(word, words)}{example}")


def weights_of(model: ir.Model, operators: dict[str, int], belongs: Callable[[str], bool]) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield (node, weight) for every node of one of `operators` (name → input) that reads a matrix initializer of the part.

    The kernel of a `Conv` counts as a matrix, whatever its rank.
    """
    for node in list(model.graph):
        place = operators.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        value = node.inputs[place] if place is not None and place < len(node.inputs) else None
        if value is None or not value.is_initializer() or value.const_value is None or not belongs(value.name or ""):
            continue
        matrix = len(value.const_value.shape) == 2 or node.op_type == "Conv"
        if matrix and value.const_value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            yield node, value


def keyed(value: ir.Value) -> KeyedTensor:
    """The weight with a key that says what its bytes are, so that what is derived from it is stored once and never mistaken."""
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"'{value.name}' is no initializer")
    if isinstance(tensor, KeyedTensor):
        return tensor
    key = f"{value.name}|{hashlib.sha256(tensor.tobytes()).hexdigest()}"
    return KeyedTensor(key, lambda: tensor, tensor.dtype, shape_of(tensor), value.name or "")


def register(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """Add an initializer of the tensor's name."""
    value = ir.Value(name=tensor.name, shape=ir.Shape(shape_of(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def replace_input(model: ir.Model, old: ir.Value, new: ir.Value, users: list[ir.Node]) -> None:
    """Make `users` read `new`, and drop the initializer `old` when nobody reads it any more."""
    for user in users:
        for place, value in enumerate(user.inputs):
            if value is old:
                user.replace_input_with(place, new)
    if not old.uses() and not old.is_graph_output():
        del model.graph.initializers[old.name or ""]
