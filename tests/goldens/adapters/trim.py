"""TRIM: a ratio, or (k of -1) the official outlier share, whose count becomes the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Site
from tmc_export.graphs.trim import Trim, similarity


def refuse(case: Case) -> None:
    """No patch above the fence: a share of 0."""
    if "k=0" not in case.note:
        raise NotCovered("the official code fails on it, and the note names no count of 0")
    config, model = Trim.Config(keep=Budget(share=0.0)), facts()
    (stage,) = Trim.stages(Site.parse("encoder"), config, model)
    Trim.layout(stage, layout(576, 64), config, model)


def build(case: Case) -> Program:
    width, c = case.inputs["proj"].shape
    ratio = float(case.params["k"])
    n = case.inputs["feat"].shape[1]
    keep = Budget(tokens=case.outputs["kept"].shape[1]) if ratio < 0 else Budget(tokens=int(n * ratio))
    config, made = Trim.Config(keep=keep, width=width), facts()
    model = replace(made, encoder=replace(made.encoder, width=c))
    (stage,) = Trim.stages(Site.parse("encoder"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["feat"]
        named = (
            ("vision_model.post_layernorm.weight", "ln_w"),
            ("vision_model.post_layernorm.bias", "ln_b"),
            ("visual_projection.weight", "proj"),
        )
        weights = {name: inputs[key] for name, key in named}
        here = replace(context(x, layout(n, c), model, {stage.needs[0]: inputs["text"]}), weights=weights)
        out = Trim.apply(stage, x, here, config)
        return {
            "tokens_fp16": out.tokens.half().float(),
            "kept": out.source[:, :-1],
            "softmax_neg_sim": (-similarity(x, inputs["text"], weights, config.eps)).softmax(dim=1),
        }

    return Program({name: case.tensor(name) for name in case.inputs}, run, {"count": "the shape of the tokens"})
