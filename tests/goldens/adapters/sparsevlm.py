"""SparseVLM: three kinds of cases, told apart by their inputs: raters, one sparse layer, clustering alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Context, Site
from tmc_export.graphs._ops import one_hot
from tmc_export.graphs.sparsevlm import TABLES, SparseVLM, merge_clusters, ratings, score

_ORDER = {2: 0, 6: 1, 15: 2}  # the official layer, counted from 0 -> which cut
_HEADS = 14


def build(case: Case) -> Program:
    if "x" in case.inputs:
        return _cluster(case)
    return _layer(case) if "rater_idx" in case.inputs else _raters(case)


def _span(case: Case) -> tuple[int, int]:
    return int(case.params.get("v_start", 35)), int(case.params.get("v_num", 576))


def _cluster(case: Case) -> Program:
    count = int(case.params["cluster_num"])

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        return {"merged": merge_clusters(x, count, torch.ones(x.shape[:2], dtype=torch.bool))[0]}

    return Program({"x": case.tensor("x")}, run)


def _raters(case: Case) -> Program:
    start, n = _span(case)
    config, model = SparseVLM.Config(), facts()
    stage = SparseVLM.stages(Site("decoder", config.layers[0]), config, model)[0]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden = inputs["hidden"]
        tokens, text = hidden[:, start : start + n], hidden[:, start + n :]
        there = torch.ones(text.shape[:2], dtype=torch.bool)
        plain = context(tokens, layout(n, hidden.shape[2]), model)
        here = Context(plain.layout, model, plain.valid, plain.source, text=text, text_valid=there)
        raters = SparseVLM.apply(stage, tokens, here, config).state["raters"]
        return {"rater_mask": raters, "m_v_t": ratings(tokens, plain.valid, text, there)}

    return Program({"hidden": case.tensor("hidden")}, run, {"t_token_idx": "the places of rater_mask; how many depends on the data"})


def _config(case: Case, n: int) -> SparseVLM.Config:
    """The one sparse layer of the case; the official code lowers its budget to all but one token."""
    version, layer = (2 if case.params.get("v2") else 1), int(case.params["layer"])
    table = TABLES[version][int(case.params.get("retain", 192))]
    budget = Budget(tokens=min(table[_ORDER[layer]], n - 1))
    return SparseVLM.Config.model_validate({"version": version, "layers": (layer + 1,), "keep": (budget,), "heads": _HEADS})


def _layer(case: Case) -> Program:
    start, n = _span(case)
    config = _config(case, n)
    model = facts()
    heads, m = case.inputs["attn_text_rows"].shape[1], case.inputs["attn_text_rows"].shape[2]
    model = replace(model, decoder=replace(model.decoder, heads=heads))
    stage = SparseVLM.stages(Site("decoder", config.layers[0]), config, model)[1]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden, columns = inputs["hidden"], inputs["attn_text_rows"][..., start : start + n]
        rows = columns if config.version == 2 else columns.mean(dim=1)
        raters = one_hot(inputs["rater_idx"].unsqueeze(0), m).amax(dim=1).bool()
        tokens = hidden[:, start : start + n]
        here = context(tokens, layout(n, hidden.shape[2]), model, {stage.needs[0]: rows}, {"raters": raters})
        out = SparseVLM.apply(stage, tokens, here, config)
        joined = torch.cat([hidden[:, :start], out.tokens, hidden[:, start + n :]], dim=1)
        stay = one_hot(out.source, n).amax(dim=1).bool()
        before, after = torch.arange(start), torch.arange(start + n, hidden.shape[1])
        kept = torch.cat([before, out.source[0] + start, after])
        first = torch.arange(joined.shape[1])
        return {
            "hidden": joined,
            "position_ids": (kept if config.version == 2 else first).unsqueeze(0),
            "keep_mask": stay,
            "score": score(rows, raters, here.valid, config.heads),
            "v_num_out": torch.tensor(out.tokens.shape[1]),
        }

    return Program({name: case.tensor(name) for name in ("hidden", "attn_text_rows", "rater_idx")}, run)
