"""From a failing subgraph to the node at fault.

A difference is looked for tensor by tensor: both graphs run with every tensor marked as an output, and the first node that is wrong *on the
good graph's values* is the one at fault, however errors mix behind it. What marking hides (a fault of onnxruntime's fusions) and what
has no values (a refusal) is found by shrinking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmc_export.core.lazy import require
from tmc_export.debug._fp8 import with_codes_inside
from tmc_export.debug.differ import Difference, compare, wrong_nodes
from tmc_export.debug.fault import Fault, Kind, NodeFault
from tmc_export.debug.graph import Workspace, cut_out, execute, load_graph, mark_all, weights_of
from tmc_export.debug.shrink import prefix_before, shrink
from tmc_export.engine._proto import read_graph
from tmc_export.engine.build import weight_files
from tmc_export.verify.tolerances import Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["locate_difference", "locate_refusal", "workspace_of"]

_TRIED = 64
"""Wrong nodes that are tried alone, in order, before the graph is shrunk as a whole."""


def workspace_of(onnx: Path) -> Workspace:
    """Return a workspace for models cut out of a bundle's graph.

    Raises:
        BundleError: the graph cannot be read, or a weight file is missing.
    """
    return Workspace(weight_files(onnx, read_graph(onnx)))


def locate_difference(
    file: str, suspect: Path, good: Path, feed: Mapping[str, Array], table: Tolerance, why: str, compared_with: str
) -> Fault | None:
    """Find the first node of `suspect` that is wrong, and cut out what shows it.

    Args:
        file: the subgraph's name in the bundle.
        suspect: the graph.
        good: the one to compare with; the same file means: without onnxruntime's optimizations.
        feed: inputs on which an output differs.
        table: what may differ.
        why: the output that differs, for the report.
        compared_with: as in `Fault`.

    Returns:
        None when no part of the graph shows the difference by itself.
    """
    model, twin = load_graph(suspect), load_graph(good)
    with workspace_of(suspect) as here, workspace_of(good) as there:
        got = execute(here.write(mark_all(model)), feed)
        right = {**feed, **execute(there.write(mark_all(twin)), feed, optimised=suspect != good)}

        def difference(part: Any) -> Difference | None:
            try:
                out = execute(here.write(part), right)
            except RuntimeError:  # an input without a value: the good graph has no such tensor
                return None
            found = [compare(name, value, right[name], table) for name, value in out.items() if name in right]
            return max((d for d in found if d is not None), key=lambda d: d.error, default=None)

        part, found = _first_alone(model, got, right, table, difference)
        if part is None or found is None:
            part = shrink(model, lambda candidate: difference(candidate) is not None)
            found = difference(part)
        if found is None:
            return None
        node = next(n for n in part.graph.node if found.tensor in n.output)
        weights = tuple(dict.fromkeys(name for n in part.graph.node for name in weights_of(part, n)))
        differing = () if suspect == good else _differing(weights, part, here.folder, twin, there.folder)
        beside = tuple(f"{_operator(n)} {n.name}" for n in part.graph.node if n is not node)
        fault = NodeFault(node.name, _operator(node), found.tensor, found.error, found.allowed, found.note, weights, differing, beside)
        inputs = {i.name: right[i.name] for i in part.graph.input}
        want = {o.name: right[o.name] for o in part.graph.output if o.name in right}
        reduced, inputs = with_codes_inside(inline(part, here.folder), inputs)
        return Fault(file, "parity", why, compared_with, fault, len(model.graph.node), reduced, inputs, want)


def _first_alone(
    model: Any, got: Mapping[str, Array], right: Mapping[str, Array], table: Tolerance, difference: Callable[[Any], Difference | None]
) -> tuple[Any, Difference | None]:
    """Return the first node that is wrong on the good graph's values, cut out with what has no value there; (None, None) without one."""
    for index, _ in islice(wrong_nodes(model, got, right, table), _TRIED):
        outputs = [name for name in model.graph.node[index].output if name in right]
        part = cut_out(model, outputs, [name for name in right if name not in outputs])
        if (found := difference(part)) is not None:
            return part, found
    return None, None


def _operator(node: Any) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def inline(model: Any, folder: Path) -> Any:
    """Return a copy of a model with its external weights read into it."""
    copy = type(model)()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.external_data:
            tensor.raw_data = _bytes_of(tensor, folder)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
    return copy


def _bytes_of(tensor: Any, folder: Path) -> bytes:
    """Return an initializer's values as they lie in the file; onnx's own reader refuses a file with several links, such as ours."""
    if not tensor.external_data:
        helper = require("onnx.numpy_helper", extra="export", purpose="debug a bundle")
        return bytes(tensor.raw_data) or bytes(helper.to_array(tensor).tobytes())
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / Path(place["location"]).name).open("rb") as file:
        file.seek(int(place.get("offset", 0)))
        return file.read(int(place["length"])) if "length" in place else file.read()


def _differing(names: tuple[str, ...], model: Any, folder: Path, twin: Any, other: Path) -> tuple[str, ...]:
    """Return the weights that hold other values in the good graph; one of another name or type there is passed over."""
    theirs = {w.name: w for w in twin.graph.initializer}
    return tuple(
        mine.name
        for mine in model.graph.initializer
        if mine.name in names
        and (his := theirs.get(mine.name)) is not None
        and (mine.data_type, list(mine.dims)) == (his.data_type, list(his.dims))
        and _bytes_of(mine, folder) != _bytes_of(his, other)
    )


# ------------------------------------------------------------------------------------------------------------------ refusals
def locate_refusal(
    file: str, kind: Kind, model: Any, space: Workspace, why: str, refuses: Callable[[Path], str | None], feed: Mapping[str, Array]
) -> Fault:
    """Shrink a graph that is refused to the smallest one that is refused in the same way.

    Args:
        file: the subgraph's name in the bundle.
        kind: what refuses it.
        model: the graph.
        space: holds its weights.
        why: the refusal.
        refuses: why a model is refused, or None; for `run` it is not used.
        feed: for `run`, the inputs.
    """
    values = dict(feed)

    def runs(path: Path) -> str | None:
        try:
            execute(path, values)
        except RuntimeError as error:
            return str(error)
        return None

    judge = runs if kind == "run" else refuses

    def fails(part: Any) -> bool:
        said = judge(space.write(part))
        return said is not None and _manner(said) == _manner(why)

    if kind == "run" and (before := prefix_before(model, fails)) is not None:
        values |= execute(space.write(mark_all(before)), feed)
    part = shrink(model, fails)
    node = part.graph.node[-1]
    weights = tuple(dict.fromkeys(name for n in part.graph.node for name in weights_of(part, n)))
    beside = tuple(f"{_operator(n)} {n.name}" for n in part.graph.node if n is not node)
    fault = NodeFault(node.name, _operator(node), next(name for name in node.output if name), weights=weights, beside=beside)
    inputs = {i.name: values[i.name] for i in part.graph.input if i.name in values}
    reduced, inputs = with_codes_inside(inline(part, space.folder), inputs)
    return Fault(file, kind, why, "", fault, len(model.graph.node), reduced, inputs)


def _manner(said: str) -> str:
    """The kind of a refusal: onnxruntime's error class, the operator that TensorRT's parser names, or that the builder gives up."""
    if said.startswith("cannot build"):
        return "cannot build"
    return ":".join(said.split(":")[:3]) if said.startswith("[ONNXRuntimeError]") else said.split("'")[0].split(" at ")[0]
