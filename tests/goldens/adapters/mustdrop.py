"""MustDrop: window pooling in the encoder, or the filter of one decoder layer; the official counts are handed in as budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout, square
from tmc_export.graphs._contract import Attention, Budget, Site
from tmc_export.graphs._ops import keep_top, one_hot, partition
from tmc_export.graphs.mustdrop import MustDrop, relevance


def build(case: Case) -> Program:
    return _filter(case) if "attn_text_rows" in case.inputs else _pool(case)


def _pool(case: Case) -> Program:
    high, wide = (int(side) for side in case.params.get("window", (3, 3)))
    n = case.inputs["x"].shape[1]
    merged = (n - case.outputs["tokens"].shape[1]) // (high * wide - 1)
    config, model = MustDrop.Config(window=(high, wide), merge=Budget(tokens=merged)), facts(class_tokens=1)
    stage = MustDrop.stages(Site("encoder", 1), config, model)[0]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        arriving = layout(n, x.shape[2], class_tokens=1, grid=square(n - 1))
        out = MustDrop.apply(stage, x, context(x, arriving, model), config)
        assert out.assign is not None
        size = one_hot(out.assign, out.tokens.shape[1]).sum(dim=1).unsqueeze(2)
        return {"tokens": out.tokens, "size": size, "count": torch.tensor(out.tokens.shape[1])}

    return Program({"x": case.tensor("x")}, run)


def _filter(case: Case) -> Program:
    start = int(case.params.get("v_start", 35))
    n = case.inputs["attn_text_rows"].shape[3] - start - case.inputs["attn_text_rows"].shape[2]
    kept, important = case.outputs["kept"].size, case.outputs["important"].size
    config = MustDrop.Config(
        key=Budget(tokens=case.inputs["key_set"].size),
        layers=(3,),
        keep=(Budget(tokens=kept),),
        global_threshold=max(float(case.params["global_thr"]), 1e-30),
        individual_threshold=max(float(case.params["individual_thr"]), 1e-30),
    )
    model = facts(class_tokens=1)
    stage = MustDrop.stages(Site("encoder", 1), config, model)[2]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = inputs["attn_text_rows"].mean(dim=1)[:, :, start : start + n]
        key = one_hot(inputs["key_set"].unsqueeze(0), n).amax(dim=1).bool()
        tokens = torch.zeros(1, n, 4)
        here = context(tokens, layout(n, 4), model, {need: rows for need in stage.needs if isinstance(need, Attention)}, {"key": key})
        here = replace(here, text_valid=torch.ones(rows.shape[:2], dtype=torch.bool))
        out = MustDrop.apply(stage, tokens, here, config)
        points = relevance(rows, here.text_valid, here.valid, config)
        above, _ = keep_top(points, important)
        places, _ = partition(out.state["key"], case.inputs["key_set"].size)
        return {"important": above[0], "kept": out.source[0], "key_set_new": places[0]}

    return Program({name: case.tensor(name) for name in ("attn_text_rows", "key_set")}, run)
