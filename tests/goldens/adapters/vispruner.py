"""VisPruner: the golden leaves the class token out of features and attention, so one is put in front."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Site
from tmc_export.graphs._ops import one_hot
from tmc_export.graphs.vispruner import VisPruner


def _config(case: Case) -> VisPruner.Config:
    p = case.params
    return VisPruner.Config(keep=Budget(tokens=int(p.get("T", 128))), important=float(p.get("ratio", 0.5)))


def build(case: Case) -> Program:
    config, model = _config(case), facts(class_tokens=1)
    (stage,) = VisPruner.stages(Site.parse("encoder"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens = functional.pad(inputs["feat"], (0, 0, 1, 0))
        score = functional.pad(inputs["attn"].mean(dim=1), (1, 0))
        n = inputs["feat"].shape[1]
        arriving = layout(n + 1, tokens.shape[2], class_tokens=1)
        out = VisPruner.apply(stage, tokens, context(tokens, arriving, model, {stage.needs[0]: score}), config)
        kept = out.source - 1
        return {"kept": kept, "mask": one_hot(kept, n).amax(dim=1).long()}

    return Program({name: case.tensor(name) for name in ("feat", "attn")}, run)
