"""ONNX files as the debugger handles them: read without their weights, cut into smaller models, run node by node.

A model that is cut out refers to the same external weight files; `Workspace` is a temporary folder in which those lie beside it, linked
where the file system can. `com.microsoft` operators and int4 weights pass through untouched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.core.errors import BundleError
from tmc_export.core.lazy import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Workspace", "cut_out", "execute", "load_graph", "mark_all", "quiet", "refused", "weights_of"]


def quiet() -> AbstractContextManager[Any]:
    """Return a context in which polygraphy says nothing: it writes to standard output, which is the report's."""
    logger = require("polygraphy.logger", extra="export", purpose="debug a bundle").G_LOGGER
    found: AbstractContextManager[Any] = logger.verbosity(logger.CRITICAL)
    return found


def load_graph(path: Path) -> Any:
    """Read an ONNX file (`onnx.ModelProto`); external weights stay where they are.

    Raises:
        BundleError: it is no ONNX model.
    """
    onnx = require("onnx", extra="export", purpose="debug a bundle")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises classes of several implementations
        raise BundleError(f"{path} is no ONNX model ({' '.join(str(error).split())}); build the bundle again") from error
    if not model.graph.node:
        raise BundleError(f"{path} is no ONNX model: it has no node; build the bundle again")
    return model


def _reads(node: Any) -> list[str]:
    """Return what a node reads, the outer values of its subgraphs included."""
    found = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            inner = {i.name for i in (*graph.input, *graph.initializer)} | {o for n in graph.node for o in n.output}
            found += [name for n in graph.node for name in _reads(n) if name not in inner]
    return found


def _types(model: Any) -> dict[str, Any]:
    return {info.name: info for info in (*model.graph.value_info, *model.graph.output, *model.graph.input)}


def weights_of(model: Any, node: Any) -> list[str]:
    """Return the initializers that a node reads, larger than a vector of sizes."""
    names = {w.name: w for w in model.graph.initializer}
    return [name for name in _reads(node) if name in names and int(np.prod(names[name].dims)) > 8]


def cut_out(model: Any, outputs: Sequence[str], inputs: Iterable[str] = ()) -> Any:
    """Return the smallest model that computes `outputs`, `inputs` being given besides the graph's own.

    Args:
        model: read by `load_graph`.
        outputs: tensors, in order.
        inputs: tensors at which it begins; one whose type is not written in the file is computed instead.
    """
    onnx = require("onnx", extra="export", purpose="debug a bundle")
    types = _types(model)
    made = {name: index for index, node in enumerate(model.graph.node) for name in node.output if name}
    weights = {w.name: w for w in model.graph.initializer}
    ends = {name for name in inputs if name in types} | {i.name for i in model.graph.input}
    needed, seen, read = list(outputs), set[int](), set[str]()
    while needed:
        name = needed.pop()
        if name in read or (name in ends and name not in outputs):
            read.add(name)
            continue
        read.add(name)
        index = made.get(name)
        if index is not None and index not in seen:
            seen.add(index)
            needed += _reads(model.graph.node[index])
    nodes = [model.graph.node[index] for index in sorted(seen)]
    own = {name for node in nodes for name in node.output}
    entering = [name for name in types if name in ends and name in read and name not in own and name not in weights]
    graph = onnx.helper.make_graph(
        nodes,
        model.graph.name,
        [types[name] for name in entering],
        [types.get(name) or onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        [tensor for name, tensor in weights.items() if name in read],
        value_info=[info for info in model.graph.value_info if info.name in own and info.name not in outputs],
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions)


def mark_all(model: Any) -> Any:
    """Return a copy of a model with every tensor an output, as polygraphy's `--onnx-outputs mark all` does."""
    onnx_backend = require("polygraphy.backend.onnx", extra="export", purpose="debug a bundle")
    constants = require("polygraphy.constants", extra="export", purpose="debug a bundle")
    return onnx_backend.modify_outputs(model, outputs=constants.MARK_ALL, copy=True)


class Workspace:
    """A temporary folder with the weights of one graph, in which models cut out of it are written and run.

    Args:
        weights: the external weight files; models name them without a folder.
    """

    def __init__(self, weights: Iterable[Path]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tmc-debug-"))
        self._count = 0
        for path in weights:
            target = self.folder / path.name
            try:
                os.link(path.resolve(), target)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, target)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, model: Any) -> Path:
        """Write a model beside the weights; every call gives a new file."""
        self._count += 1
        path = self.folder / f"{self._count}.onnx"
        path.write_bytes(_plain(model).SerializeToString())
        return path


def _plain(model: Any) -> Any:
    """Name weight files without their folder: `../onnx/b.data` → `b.data`."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = Path(entry.value).name
    return model


def execute(path: Path, feed: Mapping[str, Array], *, optimised: bool = True, load_only: bool = False) -> dict[str, Array]:
    """Run a model on onnxruntime's CPU provider, int4 weights multiplied as on a device.

    Args:
        path: the model.
        feed: its inputs; others are ignored.
        load_only: load it and return nothing.
        optimised: with onnxruntime's graph optimizations, as it has them by itself; without, every node is a kernel of its own.

    Raises:
        RuntimeError: onnxruntime refuses to load or to run it; the message is its first line.
    """
    import onnxruntime as ort

    from tmc_export.runtime._fp8 import run

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [] if load_only else [o.name for o in session.get_outputs()]
        if not names:
            return {}
        return run(session, names, {i.name: feed[i.name] for i in session.get_inputs()})
    except MemoryError:
        raise
    except KeyError as error:
        raise RuntimeError(f"the input {error} has no value") from error
    except Exception as error:  # onnxruntime raises classes of its own C++ module that share no documented base
        raise RuntimeError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def refused(path: Path) -> str | None:
    """Return why onnxruntime does not load a model; None when it does."""
    try:
        execute(path, {}, load_only=True)
    except RuntimeError as error:
        return str(error)
    return None
