"""Reads and rewrites the few fields of an ONNX file that the engine room needs, without the `onnx` package.

A board that builds its engines has TensorRT and Python, not `onnx`. The field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from tmc_export.core.errors import BundleError

__all__ = [
    "ExternalTensor", "GraphFacts", "GraphInput", "external_tensors", "gathered_table", "read_by", "read_graph", "with_graph_inputs",
    "with_plain_locations",
]  # fmt: skip

_Found = TypeVar("_Found")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT = 1, 5, 11
_NODE_INPUT, _NODE_ATTRIBUTE, _ATTRIBUTE_INT = 1, 5, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 2, 8, 13


@dataclass(frozen=True)
class GraphInput:
    """One graph input; a dimension is a number, or the name of a symbol (empty when it has none)."""

    name: str
    dims: tuple[int | str, ...]

    @property
    def static(self) -> bool:
        """True when every dimension is a number."""
        return all(isinstance(dim, int) for dim in self.dims)


@dataclass(frozen=True)
class GraphFacts:
    """What an ONNX file says about itself.

    Attributes:
        opset: of the default domain.
        operators: operator types, sorted; those of other domains as `domain::Type`.
        inputs: graph inputs that are no initializers.
        locations: files of external weights, as written in the graph, sorted.
        bytes: size of the ONNX file.
    """

    opset: int
    operators: tuple[str, ...]
    inputs: tuple[GraphInput, ...]
    locations: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class ExternalTensor:
    """A weight that lies in another file.

    Attributes:
        name: of the initializer.
        type: ONNX's number of its element type; 1 is float32.
        dims: its shape.
        location: the file, as written in the graph.
        offset, length: bytes in that file.
    """

    name: str
    type: int
    dims: tuple[int, ...]
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    start: int  # of the tag
    body: int  # of the value
    end: int
    value: int  # a varint's value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[_Field]:
    at, size = 0, len(data)
    while at < size:
        start = at
        tag, at = _varint(data, at)
        number, wire, value = tag >> 3, tag & 7, 0
        if wire == _VARINT:
            value, end = _varint(data, at)
            body = at
        elif wire == _BYTES:
            length, body = _varint(data, at)
            end = body + length
        elif wire in (_FIXED64, _FIXED32):
            body, end = at, at + (8 if wire == _FIXED64 else 4)
        else:
            raise IndexError(f"wire type {wire}")
        if end > size:
            raise IndexError("truncated")
        yield _Field(number, wire, start, body, end, value)
        at = end


def _text(data: memoryview, number: int) -> str:
    for item in _fields(data):
        if item.number == number and item.wire == _BYTES:
            return bytes(data[item.body : item.end]).decode()
    return ""


def _bodies(data: memoryview, number: int) -> Iterator[memoryview]:
    for item in _fields(data):
        if item.number == number and item.wire == _BYTES:
            yield data[item.body : item.end]


def _operator(node: memoryview) -> str:
    domain, kind = _text(node, 7), _text(node, 4)
    return kind if domain in ("", "ai.onnx") else f"{domain}::{kind}"


def _input(info: memoryview) -> GraphInput:
    dims: list[int | str] = []
    for kind in _bodies(info, 2):
        for tensor in _bodies(kind, 1):
            for shape in _bodies(tensor, 2):
                for dim in _bodies(shape, 1):
                    numbers = [item.value for item in _fields(dim) if item.number == 1 and item.wire == _VARINT]
                    dims.append(numbers[0] if numbers else _text(dim, 2))
    return GraphInput(_text(info, 1), tuple(dims))


def _location(tensor: memoryview) -> str:
    for entry in _bodies(tensor, _TENSOR_EXTERNAL):
        if _text(entry, 1) == "location":
            return _text(entry, 2)
    return ""


def _facts(data: memoryview) -> GraphFacts:
    opset, operators, inputs, locations, weights = 0, set[str](), list[GraphInput](), set[str](), set[str]()
    for entry in _bodies(data, _MODEL_OPSET):
        if _text(entry, 1) in ("", "ai.onnx"):
            opset = next((item.value for item in _fields(entry) if item.number == 2), 0)
    for graph in _bodies(data, _MODEL_GRAPH):
        for item in _fields(graph):
            body = graph[item.body : item.end]
            if item.number == _GRAPH_NODE:
                operators.add(_operator(body))
            elif item.number == _GRAPH_INPUT:
                inputs.append(_input(body))
            elif item.number == _GRAPH_INITIALIZER:
                weights.add(_text(body, _TENSOR_NAME))
                locations.add(_location(body))
    free = tuple(item for item in inputs if item.name not in weights)
    return GraphFacts(opset, tuple(sorted(operators)), free, tuple(sorted(locations - {""})), len(data))


def _parse(path: Path, parse: Callable[[memoryview], _Found]) -> _Found:
    """What a function finds in the bytes of an ONNX file.

    Raises:
        BundleError: the file is missing, empty or no ONNX model.
    """
    try:
        data = path.read_bytes()
        if not data:
            raise ValueError("it is empty")
        return parse(memoryview(data))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read the graph '{path}': {error}; build the bundle again") from error
    except IndexError as error:
        raise BundleError(f"'{path}' is no ONNX model, or it is cut short ({error}); build the bundle again") from error


def read_graph(path: Path) -> GraphFacts:
    """Read the facts of an ONNX file; weights are not touched.

    Raises:
        BundleError: the file is missing, empty or no ONNX model.
    """
    facts = _parse(path, _facts)
    if not facts.opset or not facts.operators:
        raise BundleError(f"'{path}' is no ONNX model: it names no operator set and no operator; build the bundle again")
    return facts


def _external(tensor: memoryview) -> ExternalTensor | None:
    entries = {_text(entry, 1): _text(entry, 2) for entry in _bodies(tensor, _TENSOR_EXTERNAL)}
    if "location" not in entries:
        return None
    dims: list[int] = []
    kind = 0
    for item in _fields(tensor):
        if item.number == _TENSOR_TYPE:
            kind = item.value
        elif item.number == _TENSOR_DIMS and item.wire == _VARINT:
            dims.append(item.value)
        elif item.number == _TENSOR_DIMS:  # packed
            at = item.body
            while at < item.end:
                value, at = _varint(tensor, at)
                dims.append(value)
    offset, length = int(entries.get("offset", "0")), int(entries.get("length", "0"))
    return ExternalTensor(_text(tensor, _TENSOR_NAME), kind, tuple(dims), entries["location"], offset, length)


def external_tensors(path: Path) -> tuple[ExternalTensor, ...]:
    """Read which weights of an ONNX file lie in other files, and where; they are not touched.

    Raises:
        BundleError: the file is missing, empty or no ONNX model.
    """
    return _parse(path, _externals)


def _externals(data: memoryview) -> tuple[ExternalTensor, ...]:
    found = (_external(tensor) for graph in _bodies(data, _MODEL_GRAPH) for tensor in _bodies(graph, _GRAPH_INITIALIZER))
    return tuple(tensor for tensor in found if tensor is not None)


def gathered_table(path: Path) -> ExternalTensor | None:
    """Return the table `[n, c]` whose rows a graph reads that is one Gather of its input, along the first axis; None: it is another graph.

    Raises:
        BundleError: the file is missing, empty or no ONNX model.
    """
    return _parse(path, _gathered)


def _gathered(data: memoryview) -> ExternalTensor | None:
    tables, nodes = _externals(data), _nodes(data)
    if len(nodes) != 1 or len(tables) != 1 or _operator(nodes[0]) != "Gather" or len(tables[0].dims) != 2:
        return None
    axes = [item.value for attribute in _bodies(nodes[0], _NODE_ATTRIBUTE) for item in _fields(attribute) if item.number == _ATTRIBUTE_INT]
    return tables[0] if _read(nodes[0])[0] == tables[0].name and not any(axes) else None


def _nodes(data: memoryview) -> list[memoryview]:
    return [node for graph in _bodies(data, _MODEL_GRAPH) for node in _bodies(graph, _GRAPH_NODE)]


def _read(node: memoryview) -> list[str]:
    """What a node reads."""
    return [bytes(name).decode() for name in _bodies(node, _NODE_INPUT)]


def _encode(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _rewrite(data: memoryview, path: tuple[int, ...], change: Callable[[memoryview], bytes]) -> bytes:
    if not path:
        return change(data)
    out = bytearray()
    for item in _fields(data):
        if item.number == path[0] and item.wire == _BYTES:
            body = _rewrite(data[item.body : item.end], path[1:], change)
            out += _message(item.number, body)
        else:
            out += data[item.start : item.end]
    return bytes(out)


def _plain(entry: memoryview) -> bytes:
    if _text(entry, 1) != "location":
        return bytes(entry)
    return _rewrite(entry, (2,), lambda value: PurePosixPath(bytes(value).decode()).name.encode())


def read_by(model: bytes, operators: Collection[str]) -> frozenset[str]:
    """Return the names of what nodes of these types read; subgraphs of control flow are not looked into."""
    return frozenset(name for node in _nodes(memoryview(model)) if _text(node, 4) in operators for name in _read(node))


def with_graph_inputs(model: bytes, tensors: Sequence[ExternalTensor]) -> bytes:
    """Return the model with these initializers named among its inputs, too: what ONNX calls their default value, no longer constants.

    Before: `graph {node, initializer: [w]}`. After: `graph {node, initializer: [w], input: [..., w]}`. Messages that follow one another
    are merged, repeated fields joined, so that the inputs are written behind the model.
    """
    return model + _message(_MODEL_GRAPH, b"".join(_message(_GRAPH_INPUT, _value_info(tensor)) for tensor in tensors))


def _value_info(tensor: ExternalTensor) -> bytes:
    shape = b"".join(_message(1, _number(1, dim)) for dim in tensor.dims)
    return _message(1, tensor.name.encode()) + _message(2, _message(1, _number(1, tensor.type) + _message(2, shape)))


def _message(number: int, body: bytes) -> bytes:
    return _encode(number << 3 | _BYTES) + _encode(len(body)) + body


def _number(number: int, value: int) -> bytes:
    return _encode(number << 3 | _VARINT) + _encode(value)


def with_plain_locations(model: bytes) -> bytes:
    """Return the model with every external weight file named without its folder: `../onnx/b.data` -> `b.data`.

    TensorRT's parser refuses a location that leads to a parent folder. Initializers only; subgraphs of control flow keep theirs.
    """
    return _rewrite(memoryview(model), (_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_EXTERNAL), _plain)
