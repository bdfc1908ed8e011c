"""A small learned method that only tests have: a norm, a linear, every `step`-th token, and learned tokens behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from tmc_export.core.facts import ModelFacts
from tmc_export.export.random_weights import random_weight
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Segment, Shape, Site, Stage

__all__ = ["Learned", "registered", "save_weights"]

Width = Literal["encoder", "decoder"]


class Learned(Method):
    """`y = W norm(x) + b` (+ x where the width stays) of every `step`-th token, then `extra` learned tokens."""

    name = "learned"
    paper = "tests only"
    official = "paper only"
    mechanism = "transform"
    sites = ("input", "encoder", "encoder.<l>", "projector", "projector.replace", "decoder.<k>")
    training_free = False
    grows = True

    class Config(MethodConfig):
        into: Width = "decoder"
        out: Width = "decoder"
        step: int = Field(default=2, ge=1)
        extra: int = Field(default=0, ge=0)
        keep_grid: bool = False
        weightless: bool = False

    @staticmethod
    def stages(at: Site, config: Learned.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(at),)

    @staticmethod
    def weights(config: Learned.Config, facts: ModelFacts) -> Mapping[str, Shape]:
        if config.weightless:
            return {}
        width = {"encoder": facts.encoder.width, "decoder": facts.decoder.width}
        into, out = width[config.into], width[config.out]
        found: dict[str, Shape] = {"norm.weight": (into,), "norm.bias": (into,), "layers.0.proj.weight": (out, into)}
        found["layers.0.proj.bias"] = (out,)
        return found | ({"registers": (config.extra, out)} if config.extra else {})

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Learned.Config, facts: ModelFacts) -> Layout:
        width = {"encoder": facts.encoder.width, "decoder": facts.decoder.width}[config.out]
        if config.weightless:
            return layout
        count = -(-(layout.tokens - layout.class_tokens) // config.step) + config.extra
        grid = layout.grid if config.keep_grid and config.step == 1 else None
        return Layout((*(s for s in layout.segments if s.kind == "class"), Segment("visual", count, grid)), width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Learned.Config) -> Compressed:
        if config.weightless:
            return Compressed(tokens, context.source, context.valid)
        w, (b, n, c) = context.weights, tokens.shape
        first = context.layout.class_tokens
        index = torch.tensor([*range(first), *range(first, n, config.step)])
        normed = torch.nn.functional.layer_norm(tokens, (c,), w["norm.weight"], w["norm.bias"])
        out = torch.nn.functional.linear(normed, w["layers.0.proj.weight"], w["layers.0.proj.bias"])
        out = (out + tokens if out.shape[2] == c else out)[:, index]
        source, valid = index.expand(b, -1), context.valid[:, index]
        if config.extra:
            out = torch.cat([out, w["registers"].expand(b, -1, -1)], 1)
            source = torch.cat([source, torch.full((b, config.extra), -1)], 1)
            valid = torch.cat([valid, torch.ones(b, config.extra, dtype=torch.bool)], 1)
        return Compressed(out, source, valid)


@contextmanager
def registered() -> Iterator[None]:
    """Let recipes name `learned` while the context lasts."""
    list(METHODS)
    METHODS._items["learned"] = Learned
    try:
        yield
    finally:
        del METHODS._items["learned"]


def save_weights(path: Path, facts: ModelFacts, prefix: str = "", seed: int = 7, dtype: Any = torch.float32, **options: Any) -> Path:
    """Write what the method declares into a safetensors file, and a tensor that nobody asked for."""
    shapes = Learned.weights(Learned.Config(**options), facts)
    tensors = {prefix + name: torch.from_numpy(random_weight(seed, name, shape)).to(dtype) for name, shape in shapes.items()}
    save_file({**tensors, prefix + "unused": torch.zeros(2)}, path)
    return path
