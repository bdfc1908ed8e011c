"""FitPrune: the golden hands the whole attention map; its tables of deletions are among the file's notes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program, folder
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Attention, Site
from tmc_export.graphs._ops import complement, gather, one_hot, top_in_order
from tmc_export.graphs.fitprune import FitPrune, score


def _count(case: Case) -> int:
    """Tokens deleted in the case's layer."""
    if "delete" in case.params:
        return int(case.params["delete"])
    head = f"scheme {int(case.params['ratio'])}: "
    note = next(n for n in json.loads((folder() / "fitprune.json").read_text())["notes"] if n.startswith(head))
    table = {int(layer): int(count) for layer, count in re.findall(r"(\d+): (\d+)", note.removeprefix(head))}
    return table[int(case.params["layer"])]


def build(case: Case) -> Program:
    start, n, layer = int(case.params.get("v_start", 35)), int(case.params["v"]), int(case.params["layer"])
    count = _count(case)
    if count == 0:
        raise NotCovered("nothing is deleted in this layer, so there is no cut")
    config, model = FitPrune.Config(delete=(*[0] * layer, count)), facts(decoder_layers=max(32, layer + 2))
    (stage,) = FitPrune.stages(Site("decoder", layer + 1), config, model)
    visual = slice(start, start + n)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        largest = inputs["attn"].amax(dim=1)
        rows = {"visual": largest[:, visual, visual], "text": largest[:, start + n :, visual]}
        captured = {need: rows[need.rows].sum(dim=1) for need in stage.needs if isinstance(need, Attention)}
        whole = inputs["out"].transpose(1, 2)  # [b, length, heads, d]: the attention's output, which the official code cuts
        tokens = whole[:, visual].flatten(2)
        here = context(tokens, layout(n, tokens.shape[2]), model, captured)
        out = FitPrune.apply(stage, tokens, here, config)
        kept = out.tokens.unflatten(2, whole.shape[2:])
        gone = complement(out.source, n)
        stay = one_hot(out.source, n).amax(dim=1).bool()[0]
        text = torch.ones(whole.shape[1] - n, dtype=torch.bool)
        return {
            "keep_mask": torch.cat([text[:start], stay, text[start:]]),
            "deleted": gather(gone, top_in_order(-gather(score(here), gone), count))[0],
            "out": torch.cat([whole[:, :start], kept, whole[:, start + n :]], dim=1).transpose(1, 2),
            "score": score(here)[0],
        }

    return Program({name: case.tensor(name) for name in ("attn", "out")}, run)
