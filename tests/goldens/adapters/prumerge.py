"""PruMerge: the golden hands the last layer's query and keys; the share of outliers, which the official code computes, is our budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Attention, Budget, Site
from tmc_export.graphs.prumerge import PruMerge

_PATCHES = 576


def _model() -> ModelFacts:
    made = facts(class_tokens=1)
    return replace(made, encoder=replace(made.encoder, spare=1))


def _plus(case: Case) -> str:
    if not case.params.get("plus", False):
        return "off"
    return "distinct" if case.params.get("adaptive", True) else "repeated"


def refuse(case: Case) -> None:
    """A share that the official code cannot use: the file names it in its note only."""
    found = re.search(r"ratio\s*[=>]?\s*(\d+(?:\.\d+)?)", case.note)
    share = case.params.get("ratio", found.group(1) if found else None)
    if share is None:
        raise NotCovered("the official code fails on it, and the file names no share")
    config = PruMerge.Config.model_construct(**dict(PruMerge.Config(plus=_plus(case))) | {"keep": Budget(share=float(share))})
    (stage,) = PruMerge.stages(Site.parse("encoder"), config, _model())
    PruMerge.layout(stage, layout(_PATCHES + 1, 1024, class_tokens=1), config, _model())


def _class_row(inputs: Mapping[str, Tensor]) -> Tensor:
    """Attention `[b, n]` of the class token, one head over the whole width."""
    q, k = inputs["q"][:, :1], inputs["k"]
    return ((q @ k.transpose(1, 2)) * k.shape[2] ** -0.5).softmax(dim=-1)[:, 0]


def _share(case: Case) -> float:
    """The share of patches kept for their attention."""
    if not case.params.get("adaptive", True):
        return float(case.params.get("ratio", 1 / 8))
    count = case.inputs["k"].shape[0] * (case.inputs["k"].shape[1] - 1)
    if "iqr_ratio" in case.outputs:
        return round(float(case.outputs["iqr_ratio"]) * count) / count
    row = _class_row({name: case.tensor(name) for name in ("q", "k")})[:, 1:].numpy()
    first, third = np.percentile(row, 25), np.percentile(row, 75)
    return float((row > third + 1.5 * (third - first)).sum()) / count


def _config(case: Case) -> PruMerge.Config:
    share, plus, n = _share(case), _plus(case), case.inputs["k"].shape[1] - 1
    sampled = None
    if plus == "distinct" and "tokens" in case.outputs:
        sampled = case.outputs["tokens"].shape[1] - 1 - int(n * share)
    return PruMerge.Config(keep=Budget(share=share), plus=plus, sampled=sampled)


def build(case: Case) -> Program:
    if case.raises is not None and case.inputs["k"].shape[0] > 1:
        raise NotCovered("the official code takes one picture here; ours chooses for every item of a batch by itself")
    config, model = _config(case), _model()
    (stage,) = PruMerge.stages(Site.parse("encoder"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, row = inputs["hidden"], _class_row(inputs)
        captured = {need: row if isinstance(need, Attention) else inputs["k"].unsqueeze(2) for need in stage.needs}
        arriving = layout(tokens.shape[1], tokens.shape[2], class_tokens=1)
        out = PruMerge.apply(stage, tokens, context(tokens, arriving, model, captured), config)
        found = {"tokens": out.tokens, "cls_attn": row[:, 1:], "count": torch.tensor(out.tokens.shape[1])}
        return {name: value for name, value in found.items() if name in case.outputs}

    skipped = {"iqr_ratio": "what the official code computes and a recipe gives; it is the budget of this comparison"}
    return Program({name: case.tensor(name) for name in ("hidden", "k", "q")}, run, skipped)
