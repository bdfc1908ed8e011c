"""TokenCarve: `mode` 0 ranks by both scores, 1 by the information, 2 by the attention."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Context, Site
from tmc_export.graphs._spectrum import singular_row_sums
from tmc_export.graphs.tokencarve import TokenCarve, joint_rank

_MODES = {0: "both", 1: "information", 2: "attention"}


def refuse(case: Case) -> None:
    """More tokens than channels: the file names both numbers only in its note."""
    found = re.search(r"(\d+) tokens, width (\d+)", case.note)
    if found is None:
        raise NotCovered("the official code fails on it, and the note names no size")
    config, model = TokenCarve.Config(keep=Budget(tokens=8)), facts()
    (stage,) = TokenCarve.stages(Site.parse("decoder.2"), config, model)
    TokenCarve.layout(stage, layout(int(found.group(1)), int(found.group(2))), config, model)


def build(case: Case) -> Program:
    p = case.params
    start, n = int(p.get("start", 35)), int(p.get("length", 576))
    config = TokenCarve.Config(
        keep=Budget(tokens=int(p.get("tokens", 192))), scores=_MODES[int(p.get("mode", 0))], weight=float(p.get("weight", 0.5))
    )
    both = config.model_copy(update={"scores": "both"})
    model = facts()
    (stage,) = TokenCarve.stages(Site.parse("decoder.2"), config, model)

    def made(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Context]:
        tokens = inputs["hidden"][:, start : start + n]
        score = inputs["attn_last_row"].mean(dim=1)[:, start : start + n]
        return tokens, context(tokens, layout(n, tokens.shape[2]), model, {stage.needs[0]: score})

    def details(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, here = made(inputs)
        return {"sv_scores": singular_row_sums(tokens)[0], "rank_score": joint_rank(tokens, here, both)[0]}

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden = inputs["hidden"]
        tokens, here = made(inputs)
        out = TokenCarve.apply(stage, tokens, here, config)
        after = torch.arange(start + n, hidden.shape[1])
        keep = torch.cat([torch.arange(start), out.source[0] + start, after])
        assert out.assign is not None
        return {
            "keep": keep,
            "hidden": torch.cat([hidden[:, :start], out.tokens, hidden[:, start + n :]], dim=1),
            "position_ids": torch.arange(keep.shape[0]).unsqueeze(0),
            "into_A": out.source[0][out.assign[0][torch.from_numpy(case.outputs["merged_B"].astype("int64")) - start]] + start,
        }

    skipped = {
        "stage1": "the first selection; its members show in keep and merged_B",
        "merged_B": "an input of the comparison of into_A: each must have merged where the official code merged it",
    }
    return Program({name: case.tensor(name) for name in ("hidden", "attn_last_row")}, run, skipped, details)
