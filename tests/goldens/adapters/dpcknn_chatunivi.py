"""Chat-UniVi: one clustering (`cluster_num`, or `ratio` of a CTM), or the whole of a picture at three scales."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Site
from tmc_export.graphs.chat_univi import ChatUniVi


def _clusters(case: Case, n: int) -> tuple[int, ...]:
    p = case.params
    if "cluster_num" in p:
        return (int(p["cluster_num"]),)
    if "ratio" in p:
        ratio = float(p["ratio"])
        return (math.ceil(ratio) if ratio > 1 else max(math.ceil(n * ratio), 1),)
    return tuple(int(p.get(f"spatial_cluster_rate{i}", (64, 32, 16)[i])) for i in range(3))


def _neighbours(case: Case, clusters: tuple[int, ...]) -> tuple[int, ...]:
    """The official `k`; a CTM lowers one that is above its clusters."""
    if "k" not in case.params:
        return (5, 3, 3)
    k = int(case.params["k"])
    if "ratio" in case.params and k > clusters[0]:
        k = min(3, max(clusters[0] // 2, 1))
    return (k,)


def build(case: Case) -> Program:
    if case.params.get("kind", "image") != "image":
        raise NotCovered("events of a video, which the image method does not cluster")
    if "noise" in case.inputs:
        raise NotCovered("noise on the densities, which the method does not have")
    name = "feat" if "feat" in case.inputs else "x"
    clusters = _clusters(case, case.inputs[name].shape[1])
    config, model = ChatUniVi.Config(clusters=clusters, neighbours=_neighbours(case, clusters)), facts()
    (stage,) = ChatUniVi.stages(Site.parse("projector"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs[name]
        out = ChatUniVi.apply(stage, x, context(x, layout(x.shape[1], x.shape[2]), model), config)
        assert out.assign is not None
        found = {"idx_cluster": out.assign, "idx_token": out.assign, "merged": out.tokens, "x": out.tokens, "tokens": out.tokens}
        return {key: value for key, value in found.items() if key in case.outputs}

    return Program({name: case.tensor(name)}, run)
