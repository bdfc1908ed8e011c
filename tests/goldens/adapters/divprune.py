"""DivPrune: the picks in their order, and sorted; `unique` below their number means that the official code picked some again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Site
from tmc_export.graphs.divprune import DivPrune, picks


def build(case: Case) -> Program:
    repeats = int(case.outputs["unique"]) < case.outputs["selected"].shape[0]
    keep = Budget(share=float(case.params["ratio"])) if "ratio" in case.params else Budget(tokens=int(case.params["k"]))
    config, model = DivPrune.Config(keep=keep, repeats=repeats), facts()
    (stage,) = DivPrune.stages(Site.parse("projector"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"].unsqueeze(0)
        here = context(x, layout(x.shape[1], x.shape[2]), model)
        kept = DivPrune.apply(stage, x, here, config).source[0]
        return {
            "selected": picks(x, kept.shape[0], here.valid, repeats=repeats)[0][0],
            "sorted": kept,
            "unique": (kept[1:] != kept[:-1]).long().sum() + torch.ones((), dtype=torch.int64),
        }

    return Program({"x": case.tensor("x")}, run)
