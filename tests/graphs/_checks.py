"""What every method must hold to, as functions that return what is wrong; the conformance suite calls them on all methods and on broken
ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from tests.graphs._onnx import execute, export
from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import (
    Attention,
    Budget,
    Compressed,
    Context,
    Features,
    Keys,
    Layout,
    Method,
    MethodConfig,
    Sample,
    Site,
    Stage,
)
from tmc_export.graphs._synthetic import FACTS, arriving_layout, context_for

# float32 sums in another order
ABSOLUTE, RELATIVE = 1e-5, 1e-5


@dataclass(frozen=True)
class Example:
    """One stage of one recipe entry of a method."""

    method: type[Method]
    at: str
    options: Mapping[str, Any] = field(default_factory=dict)
    index: int = 0
    too_much: Mapping[str, Any] = field(default_factory=dict)
    arriving: Layout | None = None

    @property
    def id(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in self.options.items())
        return "-".join(p for p in (self.method.name, self.at, options, str(self.index) if self.index else "") if p).replace(" ", "")

    @property
    def config(self) -> MethodConfig:
        return self.method.Config(**self.options)

    def made(self, batch: int = 1, seed: int = 0) -> tuple[Stage, Tensor, Context]:
        return context_for(self.method, self.config, self.at, index=self.index, batch=batch, seed=seed, arriving=self.arriving)

    def apply(self, stage: Stage, tokens: Tensor, context: Context) -> Compressed:
        with torch.no_grad():
            return self.method.apply(stage, tokens, context, self.config)


def examples() -> Iterator[Example]:
    """Every stage of every sample of every registered method."""
    for name in METHODS:
        method = METHODS.get(name)
        for sample in method.samples or (Sample(method.sites[0].replace("<l>", "1").replace("<k>", "2")),):
            stages = method.stages(Site.parse(sample.at), method.Config(**sample.options), FACTS)
            for index in range(len(stages)):
                yield Example(method, sample.at, sample.options, index, sample.too_much, sample.arriving)


def tensors(tokens: Tensor, context: Context) -> dict[str, Tensor]:
    """Everything a stage reads, by name."""
    found = {"tokens": tokens, "valid": context.valid, "source": context.source}
    for name in ("positions", "text", "text_valid"):
        value = getattr(context, name)
        if value is not None:
            found[name] = value
    found |= {f"captured.{i}": value for i, value in enumerate(context.captured.values())}
    found |= {f"state.{name}": value for name, value in context.state.items()}
    return found | {f"weights.{name}": value for name, value in context.weights.items()}


def with_tensors(context: Context, given: Mapping[str, Tensor]) -> Context:
    """The context with its tensors replaced by those of `tensors`."""
    plain = {name: given[name] for name in ("valid", "source", "positions", "text", "text_valid") if name in given}
    captured = {need: given[f"captured.{i}"] for i, need in enumerate(context.captured)}
    state = {name: given[f"state.{name}"] for name in context.state}
    return replace(context, **plain, captured=captured, state=state, weights={name: given[f"weights.{name}"] for name in context.weights})


def results(out: Compressed) -> dict[str, Tensor]:
    """Everything that leaves a stage, by name."""
    found = {name: getattr(out, name) for name in ("tokens", "source", "valid", "assign", "mix", "key_bias", "text")}
    found |= {f"state.{name}": value for name, value in out.state.items()}
    found |= {f"kv.{layer}": value for layer, value in out.kv.items()}
    return {name: value for name, value in found.items() if value is not None}


def close(name: str, got: np.ndarray, want: np.ndarray) -> list[str]:
    """Equal in shape; whole numbers exactly, values within the tolerance."""
    if got.shape != want.shape:
        return [f"{name}: shape {got.shape}, expected {want.shape}"]
    if want.dtype.kind in "iub":
        return [] if (got == want).all() else [f"{name}: {int((got != want).sum())} of {want.size} differ"]
    return [] if np.allclose(got, want, atol=ABSOLUTE, rtol=RELATIVE) else [f"{name}: off by {np.abs(got - want).max():.3g}"]


def wrong_layout(example: Example, batch: int = 2) -> list[str]:
    """`layout` equals what comes out: counts, width, index ranges, KV rows; at decoder sites the order ascends."""
    stage, tokens, context = example.made(batch)
    layout, out = example.method.layout(stage, context.layout, example.config, context.facts), example.apply(stage, tokens, context)
    k, n = layout.tokens, tokens.shape[1]
    shapes = {"tokens": (batch, k, layout.width), "source": (batch, k), "valid": (batch, k), "assign": (batch, n), "mix": (batch, k, n)}
    shapes |= {"key_bias": (batch, k)} | {f"kv.{layer}": (batch, rows) for layer, rows in layout.kv_rows.items()}
    got = results(out)
    known = {name: shape for name, shape in shapes.items() if name in got}
    found = [f"{key}: shape {tuple(got[key].shape)}, layout says {shape}" for key, shape in known.items() if got[key].shape != shape]
    found += [f"{name}: missing" for name in shapes if name.startswith("kv.") and name not in got]
    types = {"source": torch.int64, "valid": torch.bool, "assign": torch.int64, "tokens": tokens.dtype}
    found += [f"{name}: {got[name].dtype}, expected {kind}" for name, kind in types.items() if name in got and got[name].dtype != kind]
    if not bool(((out.source >= -1) & (out.source < n)).all()):
        found.append("source: outside the candidates")
    if out.assign is not None and not -1 <= int(out.assign.min()) <= int(out.assign.max()) < k:
        found.append("assign: outside the rows")
    place = torch.where(out.source < 0, n, out.source)  # synthetic tokens come after the kept ones
    rising = (place[:, 1:] > place[:, :-1]) | (out.source[:, 1:] < 0)
    if stage.at.part == "decoder" and not bool(rising.all()):
        found.append("source: not ascending at a decoder site")
    if stage.at.part == "decoder" and int((out.source < 0).sum(1).max()) != layout.synthetic:
        found.append(f"source: {int((out.source < 0).sum(1).max())} synthetic tokens, layout.synthetic says {layout.synthetic}")
    if out.mix is not None and not found:
        found += close("mix @ tokens", (out.mix @ tokens).numpy(), out.tokens.numpy())
    grid = layout.grid
    if grid is not None and grid[0] * grid[1] != k - layout.class_tokens:
        found.append(f"grid {grid} is not the {k} tokens")
    return found


def as_model(example: Example, batch: int = 1) -> tuple[onnx.ModelProto, dict[str, Tensor], dict[str, Tensor]]:
    """The stage as an ONNX graph, its inputs, and what PyTorch answers."""
    stage, tokens, context = example.made(batch)
    inputs = tensors(tokens, context)

    def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return results(example.method.apply(stage, given["tokens"], with_tensors(context, given), example.config))

    with torch.no_grad():
        return export(run, inputs), inputs, run(inputs)


def wrong_onnx(example: Example) -> list[str]:
    """onnxruntime equals PyTorch, and the graph is static and standard."""
    model, inputs, want = as_model(example)
    got = execute(model, inputs)
    found = [f"{name}: missing" for name in want if name not in got]
    return found + [d for name in want if name in got for d in close(name, got[name], want[name].numpy())] + not_static(model)


def not_static(model: onnx.ModelProto) -> list[str]:
    """Every value has a shape of numbers, and every operator is a standard one."""
    found = [f"{node.op_type}: operator of {node.domain}" for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    known = {v.name: v for group in (inferred.input, inferred.output, inferred.value_info) for v in group}
    constants = {i.name for i in inferred.initializer}
    for name in (o for node in inferred.node for o in node.output if o):
        if name in constants:
            continue
        value = known.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            found.append(f"{name}: no shape")
        elif not all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim):
            found.append(f"{name}: a dimension without a number")
    for value in inferred.input:
        if not all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim):
            found.append(f"{value.name}: an input dimension without a number")
    return found


def _item(name: str, value: Tensor, item: int) -> Tensor:
    """One item of a batch of a named tensor; weights have no batch, positions have it second."""
    if name.startswith("weights."):
        return value
    return value[:, item : item + 1] if name == "positions" else value[item : item + 1]


def wrong_batch(example: Example) -> list[str]:
    """A batch of two is two batches of one."""
    stage, tokens, context = example.made(batch=2)
    together, given, found = results(example.apply(stage, tokens, context)), tensors(tokens, context), []
    for item in range(2):
        one = {name: _item(name, value, item) for name, value in given.items()}
        alone = results(example.apply(stage, one["tokens"], with_tensors(context, one)))
        for name, value in alone.items():
            found += close(f"{name} of item {item}", together[name][item : item + 1].numpy(), value.numpy())
    return found


def wrong_padding(example: Example, share: float = 0.2) -> list[str]:
    """Padding, of tokens and of text, has no say: what it holds changes no valid row; while it is kept no valid candidate is dropped."""
    stage, tokens, context = example.made()
    n, first = tokens.shape[1], context.layout.class_tokens
    padding = torch.randperm(n - first, generator=torch.Generator().manual_seed(5))[: int(n * share)] + first
    valid = context.valid.clone()
    valid[:, padding] = False
    state = {name: torch.where(valid, value, torch.zeros_like(value)) if name == "size" else value for name, value in context.state.items()}
    context = replace(context, valid=valid, state=state)
    out = example.apply(stage, tokens, context)
    noisy, captured = tokens.clone(), {}
    noisy[:, padding] = 50.0
    silent = None if context.text_valid is None else ~context.text_valid[0]
    if silent is not None and context.text is not None:
        text = context.text.clone()
        text[:, silent] = 50.0
        context = replace(context, text=text)
    for need, value in context.captured.items():
        if not isinstance(need, (Attention, Features, Keys)):
            captured[need] = value
            continue
        changed = value.clone()
        if silent is not None and isinstance(need, Attention) and need.rows == "text" and not need.row_sum:
            changed[..., silent, :] = 50.0
        changed[(..., padding) if isinstance(need, Attention) else (slice(None), padding)] = 50.0
        captured[need] = changed
    again = example.apply(stage, noisy, replace(context, captured=captured))
    found = close("valid", again.valid.numpy(), out.valid.numpy())
    rows = out.valid[0]
    found += close("valid tokens", again.tokens[0][rows].numpy(), out.tokens[0][rows].numpy())
    found += close("source of valid rows", again.source[0][rows].numpy(), out.source[0][rows].numpy())
    origin = out.source[0]
    stayed = ~rows & ((origin < 0) | ~valid[0][origin.clamp(min=0)])  # not what a method marks as padding itself
    if example.method.layout(stage, context.layout, example.config, context.facts).grid is None and bool(stayed.any()):
        gone = torch.ones(n, dtype=torch.bool)
        gone[out.source[0][out.source[0] >= 0]] = False
        gone &= valid[0] if out.assign is None else valid[0] & (out.assign[0] < 0)
        found += [f"padding stayed while {int(gone.sum())} valid candidates were dropped"] if bool(gone.any()) else []
    return found


def not_refused(example: Example, facts: ModelFacts = FACTS) -> list[str]:
    """A budget above what arrives is refused by `layout`, in a sentence that says how to put it right."""
    stage, _, context = example.made()
    layout, config = context.layout, example.config
    update: dict[str, Any] = dict(example.too_much)
    if not update:
        more = Budget(tokens=layout.tokens + 1)
        for name, value in config:
            if isinstance(value, Budget):
                update[name] = more
            elif isinstance(value, tuple) and value and isinstance(value[0], Budget):
                update[name] = tuple(more for _ in value)
    if not update:
        return []
    return refused(example.method, stage, layout, config.model_copy(update=update), facts)


def refused(method: type[Method], stage: Stage, layout: Layout, config: MethodConfig, facts: ModelFacts) -> list[str]:
    """Return what is wrong with how `layout` refuses."""
    try:
        got = method.layout(stage, layout, config, facts)
    except ValueError as error:
        return [] if ";" in str(error) and any(c.isdigit() for c in str(error)) else [f"the refusal names no value or no remedy: {error}"]
    return [f"not refused: {layout.tokens} arrive, {got.tokens} leave"]


def wrong_engine(model: onnx.ModelProto) -> list[str]:
    """TensorRT-RTX parses the graph and builds an engine for SM89; returns the parser's or the builder's words."""
    import tensorrt_rtx as trt

    builder = trt.Builder(_logger())
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, _logger())
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return [f"parse: {e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors] or ["parse: refused without a word"]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    return [] if engine is not None and engine.nbytes > 0 else ["build: no engine"]


_LOGGERS: list[Any] = []


def _logger() -> Any:
    """One logger for the whole process: TensorRT crashes when it is replaced."""
    import tensorrt_rtx as trt

    if not _LOGGERS:
        _LOGGERS.append(trt.Logger(trt.Logger.ERROR))
    return _LOGGERS[0]


def arriving(at: str) -> Layout:
    return arriving_layout(Site.parse(at), FACTS)
