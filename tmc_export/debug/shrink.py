"""Shrinking a failing model with polygraphy's reducers, in this process.

`polygraphy debug reduce` needs onnx-graphsurgeon, reads every weight at each step and starts a process per step; its search, `BisectMarker`
and `LinearMarker`, needs none of that and is used here (docs/adr/0013-debug.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tmc_export.core.lazy import require
from tmc_export.debug.graph import cut_out

__all__ = ["shrink"]

_LINEAR = 48
"""Nodes up to which every single node is tried after bisecting, which a graph with branches may need."""


def shrink(model: Any, fails: Callable[[Any], bool]) -> Any:
    """Return a small model cut out of `model` that still fails: first the earliest failing end, then the latest failing beginning.

    Bisecting cuts the list of nodes in two, so that a branch beside the fault does not lead it astray; what is left is tried node by node.

    Args:
        model: a failing `onnx.ModelProto`, its nodes in order.
        fails: judges a model that was cut out; a tensor where it begins is an input of it.
    """
    reduce = require("polygraphy.tools.debug.subtool.reduce", extra="export", purpose="shrink a model")
    model = _reduce(model, reduce.BisectMarker, fails, _up_to)
    model = _reduce(model, reduce.BisectMarker, fails, _from)
    if 1 < len(model.graph.node) <= _LINEAR:
        model = _reduce(model, reduce.LinearMarker, fails, _only_for)
        model = _reduce(model, reduce.LinearMarker, fails, _from)
    return model


def _reduce(model: Any, kind: Any, fails: Callable[[Any], bool], part: Callable[[Any, int], Any]) -> Any:
    """Let a marker choose the nodes at which the model is cut; the smallest failing part wins."""
    count = len(model.graph.node)
    if count < 2:
        return model
    marker, best = kind(count, invert=part is _from), model
    while 0 <= marker.node_index < count:
        made = part(model, marker.node_index)
        failed = made is not None and fails(made)
        if failed and len(made.graph.node) < len(best.graph.node):
            best = made
        marker.step(not failed, count if made is None else len(made.graph.node))
        if marker.stop():
            break
    return best


def _up_to(model: Any, index: int) -> Any:
    """The nodes up to `index`; what none of them reads is an output, and so is what the model returns."""
    nodes = model.graph.node[: index + 1]
    made = [name for node in nodes for name in node.output if name]
    read = {name for node in nodes for name in node.input}
    returned = {o.name for o in model.graph.output}
    return cut_out(model, [name for name in made if name not in read or name in returned])


def _only_for(model: Any, index: int) -> Any:
    """What one node needs, and nothing beside it."""
    return cut_out(model, [name for name in model.graph.node[index].output if name])


def _from(model: Any, index: int) -> Any:
    """The nodes from `index` on, as far as outputs need them; None where no output is left."""
    before = [name for node in model.graph.node[:index] for name in node.output if name]
    outputs = [o.name for o in model.graph.output if o.name not in set(before)]
    return cut_out(model, outputs, before) if outputs else None


def prefix_before(model: Any, fails: Callable[[Any], bool]) -> Any:
    """Return the nodes before the first one that makes the model fail, all of which can be run; None when it is the first of all."""
    reduce = require("polygraphy.tools.debug.subtool.reduce", extra="export", purpose="shrink a model")
    failing = _reduce(model, reduce.BisectMarker, fails, _up_to)
    count = len(failing.graph.node) - 1
    return _up_to(failing, count - 1) if count else None
