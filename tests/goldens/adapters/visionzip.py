"""VisionZip: the golden's `dominant` leaves the class token out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Attention, Site
from tmc_export.graphs.visionzip import VisionZip


def build(case: Case) -> Program:
    config = VisionZip.Config(dominant=int(case.params["dominant"]) + 1, contextual=int(case.params["contextual"]))
    model = facts(class_tokens=1)
    (stage,) = VisionZip.stages(Site.parse("encoder"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, score = inputs["hidden"], inputs["attn_row"].sum(dim=1)
        captured = {need: score if isinstance(need, Attention) else inputs["metric"].unsqueeze(2) for need in stage.needs}
        arriving = layout(tokens.shape[1], tokens.shape[2], class_tokens=1)
        out = VisionZip.apply(stage, tokens, context(tokens, arriving, model, captured), config)
        return {"tokens": out.tokens, "dominant_sorted": out.source[:, : config.dominant]}

    inputs = {"hidden": case.tensor("hidden"), "attn_row": case.tensor("attn")[:, :, 0].contiguous(), "metric": case.tensor("metric")}
    return Program(inputs, run, {"all_indices": "in order of score; the same members are compared as dominant_sorted"})
