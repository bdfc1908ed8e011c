"""ToMe: one match and merge, a list `rs` of them in a row, or the variant that keeps every `k`-th token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Compressed, Layout, Site
from tmc_export.graphs._ops import gather
from tmc_export.graphs.tome import ToMe


def build(case: Case) -> Program:
    if "k" in case.params:
        return _kth(case, int(case.params["k"]))
    return _chain(case) if "rs" in case.params else _single(case)


def _merge(x: Tensor, metric: Tensor, size: Tensor | None, config: ToMe.Config, index: int, first: int) -> tuple[Compressed, Layout]:
    model = facts(encoder_layers=64, class_tokens=first)
    stage = ToMe.stages(Site.parse("encoder"), config, model)[index]
    arriving = layout(x.shape[1], x.shape[2], first)
    state = {} if size is None else {"size": size}
    out = ToMe.apply(stage, x, context(x, arriving, model, {stage.needs[0]: metric.unsqueeze(2)}, state), config)
    return out, ToMe.layout(stage, arriving, config, model)


def _single(case: Case) -> Program:
    first = int(bool(case.params.get("class_token", False)))
    config = ToMe.Config(r=int(case.params["r"]), clamp=True)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        size = inputs["size"].squeeze(2) if "size" in inputs else None
        x = inputs["x"]
        out, _ = _merge(x, inputs["metric"], size, config, 0, first)
        assert out.assign is not None
        evens, odds = (x.shape[1] + 1) // 2, x.shape[1] // 2
        stay = out.tokens.shape[1] - odds
        return {
            "x": out.tokens,
            "size": out.state["size"].unsqueeze(2),
            "source": out.assign,
            "unm_idx": out.source[:, :stay] // 2,
            "unmerge": gather(out.tokens, out.assign),
            "src_idx": _merged(case, out.assign, stay, evens),
            "dst_idx": gather(out.assign[:, 0::2], _merged(case, out.assign, stay, evens)) - stay,
        }

    return Program({name: case.tensor(name) for name in ("x", "metric", "size") if name in case.inputs}, run)


def _kth(case: Case, k: int) -> Program:
    """All but every k-th token merge; the sum is the mean times its count."""
    config = ToMe.Config(kth=k)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        out, _ = _merge(x, inputs.get("metric", x), None, config, 0, 0)
        assert out.assign is not None
        joining = torch.tensor([i for i in range(x.shape[1] // k * k) if i % k != k - 1])
        return {"mean": out.tokens, "sum": out.tokens * out.state["size"].unsqueeze(2), "dst_idx": out.assign[:, joining]}

    return Program({name: case.tensor(name) for name in ("x", "metric") if name in case.inputs}, run)


def _merged(case: Case, assign: Tensor, stay: int, evens: int) -> Tensor:
    """The merged even tokens in the golden's order of similarity, which `assign` does not carry; members that did not merge become -1."""
    order = torch.from_numpy(case.outputs["src_idx"].astype("int64"))
    return torch.where(gather(assign[:, 0::2], order) >= stay, order, torch.full_like(order, -1))


def _chain(case: Case) -> Program:
    rs = tuple(int(r) for r in case.params["rs"])
    first = int(bool(case.params.get("class_token", True)))
    config = ToMe.Config(r=rs, layers=tuple(range(len(rs))), clamp=True)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x, size, counts = inputs["x"], None, []
        for index in range(len(rs)):
            out, leaving = _merge(x, x, size, config, index, first)
            x, size = out.tokens, out.state["size"]
            counts.append(leaving.tokens)
        assert size is not None
        return {"x": x, "size": size.unsqueeze(2), "counts": torch.tensor(counts)}

    return Program({"x": case.tensor("x")}, run, tolerance="chained")
