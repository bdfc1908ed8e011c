"""Pooling: M3 and LLaVA's 2-D pooling by `pool`, DeCo by `adaptive_pool`; the pools over time belong to video methods."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import context, facts, layout, square
from tmc_export.graphs._contract import Method, MethodConfig, Site
from tmc_export.graphs.adaptive_pool import AdaptivePool
from tmc_export.graphs.pool import Pool


def _method(case: Case, side: int) -> tuple[type[Method], MethodConfig]:
    p = case.params
    if any("newline" in name for name in case.inputs):
        raise NotCovered("newline tokens belong to the prompt")
    if "query_num" in p:
        root = int(int(p["query_num"]) ** 0.5)
        return AdaptivePool, AdaptivePool.Config(grid=(root, root))
    if "scale" in p:
        return Pool, Pool.Config(kernel=int((side * side / int(p["scale"])) ** 0.5))
    if "mode" in p and "stride" in p:
        return Pool, Pool.Config(kernel=int(p["stride"]), mode=p["mode"])
    raise NotCovered("a pool over time, of a video method")


def build(case: Case) -> Program:
    if "x" not in case.inputs:
        raise NotCovered("no tokens x")
    side, model = square(case.inputs["x"].shape[1]), facts()
    method, config = _method(case, side[0])
    (stage,) = method.stages(Site.parse("projector"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        y = method.apply(stage, x, context(x, layout(x.shape[1], x.shape[2], grid=side), model), config).tokens
        if "pooled" not in case.outputs:
            return {"y": y}
        name = "W.mlp_projector"
        wide = torch.nn.functional.gelu(y @ inputs[f"{name}.0.weight"].T + inputs[f"{name}.0.bias"])
        return {"pooled": y, "y": wide @ inputs[f"{name}.2.weight"].T + inputs[f"{name}.2.bias"]}

    return Program({name: case.tensor(name) for name in case.inputs}, run)
