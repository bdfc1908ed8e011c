"""What the family tests share: a folder's model twice (Hugging Face's own, and parts), and subgraphs through onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from tmc_export.export.capture import capture
from tmc_export.export.checkpoint import open_checkpoint
from tmc_export.export.skeleton import make_skeleton
from tmc_export.families import family_of
from tmc_export.families._contract import Family, ModelFiles
from tmc_export.passes.pipeline import clean, specialize
from tmc_export.plan.types import BlockPlan, VisionPlan
from tmc_export.surgery.attention import register_attention
from tmc_export.surgery.block import DecoderBlock
from tmc_export.surgery.vision import Vision

__all__ = [
    "CLOSE",
    "ROUNDED",
    "Loaded",
    "block_in_onnxruntime",
    "block_inputs",
    "close",
    "eager_core",
    "files_of",
    "layer_outputs",
    "load",
    "vision_in_onnxruntime",
    "vision_plan",
]

CLOSE = 1e-5
"""Two torch programs in float32 with the same operations, seldom in another order; outputs up to 10."""

ROUNDED = 3e-5
"""onnxruntime against torch: each is up to 1e-5 from torch's float64 result on these models (sharp attention magnifies rounding)."""


@dataclass(frozen=True)
class Loaded:
    """A folder's model.

    Attributes:
        folder: where it is.
        files: its JSON files.
        family: who serves it.
        model: Hugging Face's, eager attention.
        static: the same weights, decoder with the static attention function.
    """

    folder: Path
    files: ModelFiles
    family: type[Family]
    model: Any
    static: Any


def files_of(folder: Path) -> ModelFiles:
    """Read a folder's JSON files."""
    names = ("config", "generation_config", "processor_config", "preprocessor_config", "tokenizer_config")
    paths = [folder / f"{name}.json" for name in names]
    return ModelFiles(*(json.loads(path.read_text("utf-8")) if path.is_file() else {} for path in paths))


def load(folder: Path) -> Loaded:
    """Load a folder as Hugging Face does, and once more for the parts."""
    from transformers import AutoModelForImageTextToText

    files = files_of(folder)
    models: list[Any] = [AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval() for _ in range(2)]
    name = register_attention()
    for module in models[1].modules():
        if hasattr(module, "layer_idx"):
            module.config._attn_implementation = name
    return Loaded(folder, files, family_of(dict(files.config)), *models)


def close(got: Tensor, wanted: Tensor, bound: float = CLOSE) -> None:
    """Compare element by element; shapes must agree."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    worst = float((got - wanted).abs().max())
    assert worst <= bound, f"max |difference| = {worst:g}"
    assert float(wanted.std()) > 0.05, "nothing to compare: the wanted tensor is nearly constant"


def eager_core(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """The plainest attention."""
    scores = query @ key.transpose(-1, -2) * scaling
    return (scores if mask is None else scores + mask).softmax(-1) @ value


def vision_plan(loaded: Loaded, size: tuple[int, int]) -> VisionPlan:
    """An uncompressed bucket."""
    facts = loaded.family.facts(loaded.files, size)
    return VisionPlan(0, size, facts.encoder.grid, facts, (), facts.visual_tokens, facts.visual_grid)


def _session(graph: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    ir.save(graph, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _weightless(loaded: Loaded) -> tuple[Any, Any]:
    from transformers import AutoConfig

    skeleton = make_skeleton(AutoConfig.from_pretrained(loaded.folder), torch.float32, register_attention())
    return skeleton, open_checkpoint(loaded.folder, skeleton)


def vision_in_onnxruntime(loaded: Loaded, size: tuple[int, int], pixels: Tensor, path: Path) -> tuple[Tensor, ir.Model]:
    """Capture a bucket's vision graph without weights and run it; returns the tokens and the graph."""
    skeleton, checkpoint = _weightless(loaded)
    plan = vision_plan(loaded, size)
    vision = Vision(loaded.family.vision(skeleton, size, plan.grid), plan)
    graph = capture(
        vision,
        [torch.zeros(pixels.shape)],
        input_names=["pixels"],
        output_names=vision.output_names(),
        symbols=[None],
        model=skeleton,
        checkpoint=checkpoint,
    )
    graph = specialize(clean(graph), {}, "vision")
    (tokens,) = _session(graph, path).run(None, {"pixels": pixels.numpy()})
    return torch.from_numpy(tokens), graph


def block_inputs(loaded: Loaded, plan: BlockPlan, hidden: Tensor, positions: Tensor, past: int) -> list[Tensor]:
    """Inputs of a whole block for the tokens of `hidden`, nothing cached, `past` empty slots."""
    facts = loaded.family.facts(loaded.files, loaded.family.default_size(loaded.files)).decoder
    batch, count = hidden.shape[:2]
    order = torch.arange(count).expand(batch, count)
    cache = torch.zeros(batch, facts.kv_heads, past, facts.head_dim)
    empty = torch.zeros(batch, past, dtype=torch.long)
    last = torch.full((batch,), count - 1)
    return [
        hidden,
        positions,
        order,
        torch.ones_like(order, dtype=torch.bool),
        empty,
        empty > 0,
        last,
        *[cache] * (2 * (plan.last - plan.first)),
    ]


def block_in_onnxruntime(loaded: Loaded, plan: BlockPlan, inputs: Sequence[Tensor], path: Path) -> list[Tensor]:
    """Capture a decoder block (with head) without weights, make it static for the inputs' sizes and run it."""
    skeleton, checkpoint = _weightless(loaded)
    block = DecoderBlock(loaded.family.decoder(skeleton), plan, loaded.family.windows(loaded.files))
    fixed, kv = [{1: "T"}, {2: "T"}, {1: "T"}, {1: "T"}, {1: "P"}, {1: "P"}, None], [{2: "P"}] * (2 * (plan.last - plan.first))
    tokens, past = inputs[0].shape[1], inputs[4].shape[1]
    example = block_inputs(loaded, plan, torch.zeros(1, 5, inputs[0].shape[2]), torch.zeros(inputs[1].shape[0], 1, 5, dtype=torch.long), 7)
    graph = capture(
        block,
        example,
        input_names=block.input_names(),
        output_names=block.output_names(),
        symbols=[*fixed, *kv],
        model=skeleton,
        checkpoint=checkpoint,
    )
    session = _session(specialize(clean(graph), {"T": tokens, "P": past}, "block"), path)
    given = dict(zip(block.input_names(), (t.numpy() for t in inputs), strict=True))
    known = {i.name for i in session.get_inputs()}
    return [torch.from_numpy(np.asarray(t)) for t in session.run(None, {k: v for k, v in given.items() if k in known})]


def layer_outputs(run: Callable[[], object], layers: Sequence[Any]) -> list[Tensor]:
    """Run something and return what each of `layers` put out."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(layers)
    return seen
