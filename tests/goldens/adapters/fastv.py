"""FastV: the HF variant names the removed share `r`, the lmms-eval wrapper the kept share `ratio`, the original a count."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Site
from tmc_export.graphs.fastv import FastV


def _keep(case: Case, n: int) -> Budget:
    for name in ("rank", "attention_rank", "keep", "tokens"):
        if name in case.params:
            return Budget(tokens=int(case.params[name]))
    if "r" in case.params:
        return Budget(share=1 - float(case.params["r"]))
    return Budget(tokens=int(n * float(case.params.get("ratio", 0.5)))) if "topk" not in case.outputs else Budget(share=0.5)


def build(case: Case) -> Program:
    start, n = int(case.params.get("start", 35)), int(case.params.get("length", 576))
    config, model = FastV.Config(keep=_keep(case, n)), facts()
    (stage,) = FastV.stages(Site.parse("decoder.2"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden = inputs["hidden"]
        tokens, score = hidden[:, start : start + n], inputs["attn_last_row"].mean(dim=1)[:, start : start + n]
        here = context(tokens, layout(n, hidden.shape[2]), model, {stage.needs[0]: score})
        out = FastV.apply(stage, tokens, here, config)
        text = torch.arange(start), torch.arange(start + n, hidden.shape[1])
        keep = torch.cat([text[0], out.source[0] + start, text[1]])
        found = {
            "keep": keep,
            "position_ids": keep.unsqueeze(0),
            "hidden": torch.cat([hidden[:, :start], out.tokens, hidden[:, start + n :]], dim=1),
        }
        return {name: value for name, value in found.items() if name in case.outputs}

    skipped = {
        "topk": "in order of score; the same members are compared, sorted, in keep",
        "cache_position": "0 to length - 1, a property of the official cache",
    }
    return Program({name: case.tensor(name) for name in ("hidden", "attn_last_row")}, run, skipped)
