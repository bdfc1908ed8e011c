"""Equal subgraphs, traced once in a process.

Tests build the same small models again and again, with other weights, other schemes, another method behind the first block. Tracing is most
of such a build, and what comes out hangs on the model's configuration, the module and its inputs, and on no weight. Here a graph that was
traced for an equal module is taken again, and reads the weights of the checkpoint that is asked for. `tests/api/test_traced.py` shows that
it is the graph that tracing anew would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import pytest
from torch import Tensor, nn

from tmc_export.api import exporter
from tmc_export.export.capture import capture
from tmc_export.export.checkpoint import TensorSource
from tmc_export.export.tensors import CheckpointTensor
from tmc_export.graphs import METHODS
from tmc_export.passes.pipeline import specialize
from tmc_export.surgery.block import DecoderBlock
from tmc_export.surgery.cut import Cut
from tmc_export.surgery.embed import Embed
from tmc_export.surgery.vision import Vision

__all__ = ["traced_for", "traced_once"]

_KEPT: list[tuple[object, ir.Model]] = []


def traced_for(module: nn.Module, inputs: list[Tensor], model: nn.Module, **more: Any) -> object | None:
    """What a trace hangs on; None where another module's cannot be taken.

    Those are graphs of states that are handed on, learned weights, text towers, and a test's own methods.
    """
    part: object
    if isinstance(module, Embed):
        part = "embed"
    elif isinstance(module, DecoderBlock):
        p = module.plan
        part = p.first, p.last, p.head, p.since, dict(p.query_rows), dict(p.row_sums), module.windows
    elif isinstance(module, Vision | Cut) and not (module.states.entries or module.towers or more["learned"]):
        if (isinstance(module, Cut) and module.entering) or any(_made_up(stage.method) for stage in module.plan.stages):
            return None
        part = module.plan, (module.images, module.facts, module.windows) if isinstance(module, Cut) else None
    else:
        return None
    config: Any = model.config
    told = {name: value for name, value in config.to_dict().items() if name not in ("quantization_config", "_name_or_path")}
    types = [(x.dtype, tuple(x.shape)) for x in inputs], next(model.parameters()).dtype
    return type(module), part, told, types, more["input_names"], more["symbols"], more["opset"]


def _made_up(method: str) -> bool:
    """Say whether a method is a test's own: another one of that name may be registered next."""
    return not METHODS.get(method).__module__.startswith("tmc_export.graphs.")


def _bound(traced: ir.Model, module: nn.Module, model: nn.Module, checkpoint: TensorSource) -> ir.Model:
    """A copy that reads another checkpoint."""
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    copy = traced.clone()
    for name, value in copy.graph.initializers.items():
        if isinstance(value.const_value, CheckpointTensor):
            key = names[id(parameters[name])]
            value.const_value = CheckpointTensor(checkpoint, key, parameters[name].dtype, checkpoint.shapes[key], name=name)
    return copy


def _capture_once(module: nn.Module, inputs: list[Tensor], *, model: nn.Module, checkpoint: TensorSource, **more: Any) -> ir.Model:
    key = traced_for(module, inputs, model, **more)
    number = next((n for n, (kept, _) in enumerate(_KEPT) if kept == key), None) if key is not None else None
    if number is None:
        found = capture(module, inputs, model=model, checkpoint=checkpoint, **more)
        if key is None:
            return found
        number = len(_KEPT)
        _KEPT.append((key, found))
    bound = _bound(_KEPT[number][1], module, model, checkpoint)
    bound.meta[_MARK] = number, getattr(checkpoint, "folder", None)
    return bound


_MARK = "tests._traced"
_CODES = ("QuantizeLinear", "DequantizeLinear")
"""Before weight schemes only slots have them."""
_STATIC: dict[object, ir.Model] = {}


def _specialize_once(model: ir.Model, sizes: Mapping[str, int], name: str, **more: Any) -> ir.Model:
    """Weights are read from the checkpoint of the first: its folder is the same. Slots of codes have scales of their own."""
    mark = model.meta.get(_MARK)
    if mark is None or mark[1] is None or any(node.op_type in _CODES for node in model.graph):
        return specialize(model, sizes, name, **more)
    key = mark, tuple(sorted(sizes.items())), name, tuple(sorted(more.items()))
    if key not in _STATIC:
        _STATIC[key] = specialize(model, sizes, name, **more)
    return _STATIC[key].clone()


@contextmanager
def traced_once(one_checkpoint: bool = False) -> Iterator[None]:
    """While active, `build` traces a subgraph only where none of its kind was traced in this process.

    Args:
        one_checkpoint: the weights in a folder stay what they are; then a graph gets its sizes once, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "capture", _capture_once)
        if one_checkpoint:
            patch.setattr(exporter, "specialize", _specialize_once)
        try:
            yield
        finally:
            _STATIC.clear()
