"""PyramidDrop: the golden hands the next layer's weights, so the query row is computed here as the framework would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Site
from tmc_export.graphs.pyramiddrop import PyramidDrop

_EPS = 1e-6  # of the golden's norm, found by comparing `score`


def _last_row(inputs: Mapping[str, Tensor], heads: int) -> Tensor:
    """Attention `[length]` of the last token over everything, averaged over heads."""
    x = inputs["hidden"]
    x = x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + _EPS) * inputs["ln_w"]
    length, d = x.shape[1], x.shape[2] // heads
    angle = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, d, 2).float() / d))
    cos, sin = torch.cat([angle, angle], dim=1).cos(), torch.cat([angle, angle], dim=1).sin()

    def rotated(weight: Tensor) -> Tensor:
        t = (x @ weight.T).reshape(length, heads, d).transpose(0, 1)
        return t * cos + torch.cat([-t[..., d // 2 :], t[..., : d // 2]], dim=-1) * sin

    logits = rotated(inputs["wq"])[:, -1:] @ rotated(inputs["wk"]).transpose(1, 2) * d**-0.5
    return logits.softmax(dim=-1).mean(dim=0)[0]


def build(case: Case) -> Program:
    p = case.params
    start, first, index = int(p.get("image_start", 35)), int(p.get("image_tokens0", 576)), int(p.get("stage", 0))
    ratios, heads = [float(r) for r in p.get("ratios", (1.0, 0.5, 0.25, 0.125))], int(p.get("heads", 4))
    n = int(first * ratios[index])
    layers = tuple(int(layer) for layer in p.get("layer_list", range(8, 8 * len(ratios), 8)))
    config = PyramidDrop.Config(keep=tuple(Budget(share=r) for r in ratios[1:]), layers=layers)
    model = facts(decoder_layers=layers[-1] + 8)
    stage = PyramidDrop.stages(Site("decoder", layers[0]), config, model)[index]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden = inputs["hidden"]
        tokens, score = hidden[:, start : start + n], _last_row(inputs, heads)[start : start + n]
        arriving = replace(layout(n, hidden.shape[2]), entry_tokens=first)
        out = PyramidDrop.apply(stage, tokens, context(tokens, arriving, model, {stage.needs[0]: score.unsqueeze(0)}), config)
        joined = torch.cat([hidden[:, :start], out.tokens, hidden[:, start + n :]], dim=1)
        return {
            "hidden": joined,
            "position_ids": torch.arange(joined.shape[1]).unsqueeze(0),
            "score": score,
            "kept_image": out.source[0],
            "n": torch.tensor(joined.shape[1]),
        }

    return Program({name: case.tensor(name) for name in ("hidden", "wq", "wk", "ln_w")}, run)
