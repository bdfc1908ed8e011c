"""MADTP: the golden's products of tokens and codes stand for the features, with an identity for the codes; kept rows are a set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Attention, Budget, Features, Need, Site
from tmc_export.graphs._ops import argmax, gather
from tmc_export.graphs.madtp import MADTP


def _captured(need: Need, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the framework would capture of the golden's attention."""
    if isinstance(need, Features):
        return functional.pad(inputs["token_attn"], (0, 0, 1, 0))
    assert isinstance(need, Attention)
    if need.heads == "mean":
        return functional.pad(inputs["cls_attn"], (1, 0))
    highest = inputs["self_attn"].amax(dim=1)
    return highest[:, 0] if need.rows == "cls" else highest.sum(dim=1)


def _official_order(case: Case) -> Tensor:
    """The candidates `[b, k]` of the golden's kept rows, which are copies of input rows; the official order is open."""
    x, y = case.tensor("x"), torch.from_numpy(case.outputs["y"])[:, :-1]
    equal = (y.unsqueeze(2) == x.unsqueeze(1)).all(dim=3)
    if not bool(equal.any(dim=2).all()):
        raise ValueError("a kept row of the golden is no input row; compare it another way")
    return equal.float().argmax(dim=2)


def build(case: Case) -> Program:
    if "token_attn" not in case.inputs:
        raise NotCovered("no products of tokens and codes in the file")
    n, width = case.inputs["x"].shape[1:]
    codes = case.inputs["token_attn"].shape[2]
    k = n if case.outputs["y"].shape[1] == n else case.outputs["y"].shape[1] - 1
    config, model = MADTP.Config(keep=Budget(tokens=k), codes=codes), facts(class_tokens=1)
    (stage,) = MADTP.stages(Site.parse("encoder.1.mid"), config, model)
    order = _official_order(case) if k < n else torch.arange(n).expand(case.inputs["x"].shape[0], n)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens = functional.pad(inputs["x"], (0, 0, 1, 0))
        captured = {need: _captured(need, inputs) for need in stage.needs}
        here = context(tokens, layout(n + 1, width, class_tokens=1), model, captured)
        out = MADTP.apply(stage, tokens, replace(here, weights={"space_dict": torch.eye(codes)}), config)
        found = out.source.unsqueeze(1) == (order + 1).unsqueeze(2)
        place = torch.where(found.float().amax(dim=2) > 0, argmax(found.float()), 0)
        if k < n:
            place = torch.cat([place, torch.full_like(place[:, :1], out.tokens.shape[1] - 1)], dim=1)
        return {"y": gather(out.tokens, place)}

    return Program({name: case.tensor(name) for name in ("x", "self_attn", "cls_attn", "token_attn")}, run)
