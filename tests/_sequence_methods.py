"""Methods that only tests use: each does one thing to the sequence at a decoder cut, without attention: no choice hangs on rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import (
    Compressed,
    Context,
    Layout,
    Method,
    MethodConfig,
    Positions,
    Segment,
    Site,
    Stage,
    TextEmbeds,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Barrier", "Fuse", "Mean", "Nothing", "sequence_methods"]


class Mean(Method):
    """Keep the candidates of the largest first channel, and add `made` means of all that are dropped, scaled by 1, 2, …"""

    name = "test_mean"
    sites = ("decoder.<k>",)

    class Config(MethodConfig):
        """`keep` of what arrives, `made` synthetic tokens, what becomes of positions, and whether earlier layers lose their KV, too."""

        keep: int = 8
        made: int = 2
        positions: Positions = "keep"
        kv: bool = False

    @staticmethod
    def stages(at: Site, config: Mean.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(at),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Mean.Config, facts: ModelFacts) -> Layout:
        rows = {layer: config.keep for layer in range(stage.at.layer or 0)} if config.kv else {}
        return Layout((Segment("visual", config.keep + config.made),), layout.width, config.positions, rows, synthetic=config.made)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Mean.Config) -> Compressed:
        import torch

        from tmc_export.graphs._ops import gather, keep_top

        kept, dropped = keep_top(tokens[:, :, 0].float(), config.keep, context.valid)
        source, valid = kept, gather(context.valid, kept)
        out = [gather(tokens, kept)]
        if config.made:
            weight = gather(context.valid, dropped).float().unsqueeze(2)
            mean = (gather(tokens, dropped) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1.0)
            scale = torch.arange(1, config.made + 1).float()[None, :, None]
            out.append((mean * scale).to(tokens.dtype))
            source = torch.cat([source, torch.full_like(source[:, :1], -1).expand(-1, config.made)], 1)
            valid = torch.cat([valid, context.valid.any(1, keepdim=True).expand(-1, config.made)], 1)
        kv = {layer: kept for layer in range(stage.at.layer or 0)} if config.kv else {}
        return Compressed(torch.cat(out, 1), source, valid, kv=kv)


class Nothing(Method):
    """Keep no visual token."""

    name = "test_nothing"
    sites = ("decoder.<k>", "projector")

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: MethodConfig, facts: ModelFacts) -> Layout:
        return Layout((Segment("visual", 0),), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: MethodConfig) -> Compressed:
        import torch

        none = torch.zeros(tokens.shape[0], 0, dtype=torch.int64)
        return Compressed(tokens[:, :0], none, none.bool())


class Fuse(Method):
    """Keep the first tokens, and add the mean of all of them to every text token."""

    name = "test_fuse"
    sites = ("decoder.<k>",)
    replaces_text = True

    class Config(MethodConfig):
        """`keep` of what arrives; `asks` for the text."""

        keep: int = 8
        asks: bool = True

    @staticmethod
    def stages(at: Site, config: Fuse.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(at, (TextEmbeds(),) if config.asks else ()),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Fuse.Config, facts: ModelFacts) -> Layout:
        return Layout((Segment("visual", config.keep),), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Fuse.Config) -> Compressed:
        import torch

        weight = context.valid.float().unsqueeze(2)
        mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1.0)
        text = None
        if context.text is not None:
            count = torch.arange(1, context.text.shape[1] + 1).float()[None, :, None]
            text = (context.text + mean * 0.3 / count).to(tokens.dtype)  # every text token gets another share
        first = torch.arange(config.keep).expand(tokens.shape[0], -1)
        return Compressed(tokens[:, : config.keep], first, context.valid[:, : config.keep], text=text)


class Barrier(Method):
    """Put means of the picture behind it, through which alone the text sees it."""

    name = "test_barrier"
    sites = ("projector",)
    grows = True

    class Config(MethodConfig):
        """`made` tokens."""

        made: int = 2

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Barrier.Config, facts: ModelFacts) -> Layout:
        return Layout((*layout.segments, Segment("visual", config.made)), layout.width, barrier=config.made)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Barrier.Config) -> Compressed:
        import torch

        batch, count = tokens.shape[:2]
        scale = torch.arange(1, config.made + 1).float()[None, :, None]
        made = tokens.mean(1, keepdim=True) * scale
        source = torch.cat([torch.arange(count), torch.full((config.made,), -1)]).expand(batch, -1)
        valid = torch.cat([context.valid, context.valid[:, : config.made]], 1)
        return Compressed(torch.cat([tokens, made.to(tokens.dtype)], 1), source, valid)


@contextmanager
def sequence_methods(*more: type[Method]) -> Iterator[None]:
    """Let recipes name the methods above while the context lasts."""
    list(METHODS)
    items: dict[str, Any] = METHODS._items
    before = dict(items)
    items.update({m.name: m for m in (Mean, Nothing, Fuse, Barrier, *more)})
    try:
        yield
    finally:
        items.clear()
        items.update(before)
