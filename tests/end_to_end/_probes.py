"""Methods that exist in tests only: they score with whatever rows a recipe names, and hand states from graph to graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import METHODS
from tmc_export.graphs._checks import selected
from tmc_export.graphs._contract import (
    Attention,
    Budget,
    Compressed,
    Context,
    Layout,
    Method,
    MethodConfig,
    Site,
    Stage,
    TextEmbeds,
)
from tmc_export.graphs._ops import cosine, gather, keep_top

__all__ = ["EncoderProbe", "RatersProbe", "RowsProbe", "register_probes"]


def _kept(tokens: Tensor, scores: Tensor, k: int, context: Context, state: dict[str, Tensor] | None = None) -> Compressed:
    kept, _ = keep_top(scores, k, context.valid)
    return Compressed(gather(tokens, kept), kept, gather(context.valid, kept), state=state or {})


def _everything(tokens: Tensor, context: Context, state: dict[str, Tensor]) -> Compressed:
    index = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    return Compressed(tokens, index, context.valid, state=state)


class RowsProbe(Method):
    """Keeps the tokens that the wanted rows attend to most; with `pair`, its text sum times its visual sum, as FitPrune scores."""

    name = "rows_probe"
    paper, official, mechanism = "none", "paper only", "attention"
    sites = ("decoder.<k>",)

    class Config(MethodConfig):
        """Options: those of `Attention`."""

        keep: Budget = Budget(share=0.5)
        layer: Literal["previous", "next"] = "previous"
        rows: Literal["last", "text", "visual", "window", "all"] = "text"
        heads: Literal["mean", "max", "sum", "none"] = "mean"
        window: int = 0
        row_sum: bool = False
        logits: bool = False
        pair: bool = False

    @staticmethod
    def needs(config: RowsProbe.Config) -> tuple[Attention, ...]:
        first = Attention(config.layer, config.rows, config.heads, config.window, config.row_sum, config.logits)
        return (first, replace(first, rows="visual", row_sum=True)) if config.pair else (first,)

    @staticmethod
    def stages(at: Site, config: RowsProbe.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(at, RowsProbe.needs(config)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: RowsProbe.Config, facts: ModelFacts) -> Layout:
        return selected(layout, config.keep.of(layout.tokens))

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: RowsProbe.Config) -> Compressed:
        score = torch.ones(tokens.shape[:2])
        for need in RowsProbe.needs(config):
            rows = context.captured[need]
            if rows.dim() > 2 and need.heads == "none":
                rows = rows.amax(1)
            if rows.dim() == 3:  # the strongest of the rows: one of padding must not win
                if need.rows == "text":
                    valid = context.text_valid
                    if valid is None:
                        raise ValueError("0 text rows are said to be valid; text_valid is missing")
                    rows = torch.where(valid[:, :, None], rows, -1e30)
                rows = rows.amax(1)
            score = score * rows
        return _kept(tokens, score, config.keep.of(tokens.shape[1]), context)


_RATERS = Attention("previous", "text", "mean")


class RatersProbe(Method):
    """SparseVLM's pattern: `decoder.0` keeps everything and finds the text tokens that rate, later cuts drop by their attention."""

    name = "raters_probe"
    paper, official, mechanism = "none", "paper only", "query"
    sites = ("decoder.<k>",)
    query_aware = True

    class Config(MethodConfig):
        """Options: layers of the later cuts."""

        keep: Budget = Budget(share=0.6)
        layers: tuple[int, ...] = (1, 3)

    @staticmethod
    def stages(at: Site, config: RatersProbe.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        later = tuple(Stage(Site("decoder", layer), (_RATERS, TextEmbeds()), i) for i, layer in enumerate(config.layers, start=1))
        return (Stage(at, (TextEmbeds(),)), *later)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: RatersProbe.Config, facts: ModelFacts) -> Layout:
        return layout if stage.index == 0 else selected(layout, config.keep.of(layout.tokens))

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: RatersProbe.Config) -> Compressed:
        text, valid = context.text, context.text_valid
        if text is None or valid is None:
            raise ValueError("0 text tokens; the probe asked for them")
        if stage.index == 0:
            near = cosine(text, tokens)  # [b, m, n]
            rating = torch.where(context.valid[:, None], near, -2.0).amax(2)
            mean = (rating * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
            return _everything(
                tokens, context, {"raters": valid & (rating >= mean), "order": torch.arange(tokens.shape[1]).expand_as(tokens[:, :, 0])}
            )
        raters, order = context.state["raters"], context.state["order"]
        strength = (text.float() * text.float()).sum(2).sqrt()
        score = (context.captured[_RATERS] * (raters * strength)[:, :, None]).sum(1) * (1 + order * 1e-3)
        out = _kept(tokens, score, config.keep.of(tokens.shape[1]), context)
        return replace(out, state={"raters": raters, "order": gather(order, out.source)})


_CLASS = Attention("previous", "cls", "mean")


class EncoderProbe(Method):
    """Hands the class token's attention from the encoder to a selector in the decoder; the encoder itself keeps everything."""

    name = "encoder_probe"
    paper, official, mechanism = "none", "paper only", "attention"
    sites = ("encoder",)

    class Config(MethodConfig):
        """Options: the decoder layer before which tokens are dropped."""

        keep: Budget = Budget(share=0.5)
        layer: int = 0

    @staticmethod
    def stages(at: Site, config: EncoderProbe.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        return (Stage(at, (_CLASS,)), Stage(Site("decoder", config.layer), (), 1))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: EncoderProbe.Config, facts: ModelFacts) -> Layout:
        return layout if stage.index == 0 else selected(layout, config.keep.of(layout.tokens))

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: EncoderProbe.Config) -> Compressed:
        if stage.index == 0:
            mass = context.captured[_CLASS][:, context.layout.class_tokens :]
            return _everything(tokens, context, {"mass": mass, "largest": mass.amax(1)})
        score = context.state["mass"] / context.state["largest"].clamp_min(1e-20)[:, None]
        return _kept(tokens, score, config.keep.of(tokens.shape[1]), context)


def register_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make them known until the fixture ends; registered for good, they would join the conformance suite."""
    list(METHODS)
    needs: tuple[type[Method], ...] = (RowsProbe, RatersProbe, EncoderProbe)
    for method in needs:
        monkeypatch.setitem(METHODS._items, method.name, method)
