"""Tracing a module with fake weights into an `onnx_ir.Model` whose initializers read the checkpoint when they are asked for.

Before: `DecoderBlock` with parameters on the meta device. After: a graph symbolic in the named dimensions, every initializer a
`CheckpointTensor`. No weight is read.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tmc_export.core.errors import ExportError, TmcError
from tmc_export.export.checkpoint import TensorSource
from tmc_export.export.tensors import CheckpointTensor
from tmc_export.export.translations import shared_translations

__all__ = ["OPSET", "capture", "run_on_shapes"]

OPSET = 21
"""INT4 `DequantizeLinear` with blocks needs 21; onnxruntime 1.23 reads it."""


@contextlib.contextmanager
def _fake_parameters(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Swap the meta parameters of a module for fake CPU ones while it is traced."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    fakes: dict[int, nn.Parameter] = {}
    with mode, torch.no_grad():
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    kept.append((child, name, parameter))
                    if id(parameter) not in fakes:
                        fakes[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
    for child, name, parameter in kept:
        child._parameters[name] = fakes[id(parameter)]
    try:
        yield
    finally:
        for child, name, parameter in kept:
            child._parameters[name] = parameter


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's and the exporter's own chatter; their errors still raise."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)


def capture(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str] | Callable[[], Sequence[str]],
    symbols: Sequence[Mapping[int, str] | None],
    model: nn.Module,
    checkpoint: TensorSource,
    learned: Mapping[str, tuple[TensorSource, str]] | None = None,
    opset: int = OPSET,
) -> ir.Model:
    """Trace a module.

    Args:
        module: its forward takes `inputs` in order; parameters belong to `model` (or are `learned`) and lie on the meta device.
        inputs: small real examples; only shapes and dtypes count.
        input_names: names of the inputs in the graph.
        output_names: names of the outputs in the graph; a function is asked when the module has been traced.
        symbols: per input, axis → name of its symbolic dimension.
        model: the whole model, whose state-dict names the initializers are bound to.
        checkpoint: where they are read.
        learned: further parameters of `module`, by their name in it: where each is read, and its name there.
        opset: of the graph; at least 18.

    Returns:
        A model of that opset, with symbolic dimensions named as in `symbols`, and no metadata of the tracer.

    Raises:
        ExportError: the module cannot be traced.
    """
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    local: dict[str, _Bound] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        source, key = (learned or {}).get(name) or (checkpoint, names[id(p)])
        local[name] = _Bound(source, key, p.dtype)
    dims = {s: torch.export.Dim(s, min=1, max=1 << 17) for axes in symbols if axes for s in axes.values()}
    specs = [None if not axes else {axis: dims[s] for axis, s in axes.items()} for axes in symbols]
    mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[], trace_asserts=True), allow_non_fake_inputs=True, export=True)
    try:
        with _quiet(), _fake_parameters(module, mode), torch.no_grad():
            with tracing(TracingContext(mode)):
                program = torch.export.export(module, tuple(inputs), dynamic_shapes=_nested(module, specs) if dims else None, strict=False)
            with shared_translations():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    optimize=False,
                    opset_version=opset,
                    verbose=False,
                    input_names=list(input_names),
                    output_names=list(output_names() if callable(output_names) else output_names),
                )
    except Exception as error:  # the tracer and the exporter raise classes of many kinds; every one means that the module does not trace
        if isinstance(error, (TmcError, OSError, MemoryError)):
            raise
        raise _untraceable(module, error) from error
    if exported is None:
        raise ExportError(f"{type(module).__name__}: the exporter returned no program")
    graph_model = exported.model
    _bind(graph_model, local)
    _rename_symbols(graph_model, symbols)
    _strip(graph_model)
    return graph_model


def run_on_shapes(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Run a module once without any number, for what it writes down when it runs: the shapes of states that it hands on.

    Args:
        module: its parameters lie on the meta device.
        inputs: small real examples, in the order of its forward; only shapes and dtypes count.

    Raises:
        ExportError: the module does not run on shapes alone.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _quiet(), _fake_parameters(module, mode), torch.no_grad(), mode:
            module(*(mode.from_tensor(x) for x in inputs))
    except Exception as error:  # as above
        if isinstance(error, (TmcError, OSError, MemoryError)):
            raise
        raise _untraceable(module, error) from error


def _untraceable(module: nn.Module, error: Exception) -> ExportError:
    said = str(error).splitlines()[0] if str(error) else ""
    return ExportError(f"{type(module).__name__} could not be traced: {type(error).__name__}: {said}")


def _nested(module: nn.Module, specs: list[Any]) -> tuple[Any, ...]:
    """Nest the specifications as `forward` nests its arguments: a trailing `*rest` takes a tuple."""
    import inspect

    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:
        fixed = len(parameters) - 1
        return (*specs[:fixed], tuple(specs[fixed:]))
    return tuple(specs)


@dataclass(frozen=True)
class _Bound:
    """What a parameter of the traced module is bound to: a source, its name there, and the dtype it is wanted in."""

    source: TensorSource
    key: str
    dtype: torch.dtype


def _bind(model: ir.Model, local: Mapping[str, _Bound]) -> None:
    """Give every initializer that is a fake tensor its place in its source, and drop what no node reads."""
    for name, value in list(model.graph.initializers.items()):
        raw = getattr(value.const_value, "raw", None)
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
        elif isinstance(raw, FakeTensor):
            if name not in local:
                raise ExportError(f"initializer '{name}' of the traced graph is no parameter of the module")
            bound = local[name]
            value.const_value = CheckpointTensor(bound.source, bound.key, bound.dtype, bound.source.shapes[bound.key], name=name)


def _rename_symbols(model: ir.Model, symbols: Sequence[Mapping[int, str] | None]) -> None:
    """Name the tracer's symbols (`s81`) as the caller does (`T`), wherever a shape mentions them."""
    renamed: dict[str, str] = {}
    for value, axes in zip(model.graph.inputs, symbols, strict=True):
        for axis, symbol in (axes or {}).items():
            dimension = value.shape[axis] if value.shape is not None else None
            if isinstance(dimension, ir.SymbolicDim) and dimension.value is not None:
                renamed[dimension.value] = symbol
    for value in [*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None and not value.shape.is_static():
            dims = [renamed.get(d.value or "", None) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape(dims)


def _strip(model: ir.Model) -> None:
    """Drop stack traces and tool names, so that the same input gives the same bytes."""
    model.producer_name, model.producer_version, model.doc_string = "tmc-export", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
