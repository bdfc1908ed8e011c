"""FOLDER: the simplified version on tokens alone, and LLaVA's with keys and class attention."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Attention, Budget, Site
from tmc_export.graphs.folder import Folder


def build(case: Case) -> Program:
    inside = "attn_cls" in case.inputs
    n = case.inputs["x"].shape[1]
    first = int(bool(case.params.get("class_token", inside)))
    keep = Budget(tokens=n - first - int(case.params["r"]))
    config = Folder.Config(keep=keep, alpha=float(case.params.get("alpha", 1)))
    model = facts(encoder_layers=23, class_tokens=first)
    (stage,) = Folder.stages(Site.parse("encoder.22.mid" if inside else "encoder"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        captured = {need: inputs["attn_cls"] if isinstance(need, Attention) else inputs["metric"].unsqueeze(2) for need in stage.needs}
        out = Folder.apply(stage, x, context(x, layout(n, x.shape[2], first), model, captured), config)
        return {"tokens": out.tokens, "size": out.state["size"].unsqueeze(2)}

    return Program({name: case.tensor(name) for name in ("x", "metric", "attn_cls") if name in case.inputs}, run, tolerance="chained")
