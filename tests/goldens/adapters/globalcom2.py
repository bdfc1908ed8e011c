"""GlobalCom2: thumbnail and crops are one run of candidates; the golden ends each row of the merged map with a token of sevens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import context, facts, square
from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Budget, Layout, Segment, Site
from tmc_export.graphs._ops import gather, keep_top
from tmc_export.graphs.globalcom2 import GlobalCom2, Place, crop_scales, map_of

_NEWLINE, _BEHIND = 7.0, 1 << 20


def _grid(case: Case) -> tuple[int, int]:
    """Rows and columns of crops; the file writes columns first."""
    columns, rows = (int(v) for v in case.params.get("grid", (2, 2)))
    return rows, columns


def _with_newlines(tokens: Tensor, kept: Tensor, places: Sequence[Place], rows: int) -> Tensor:
    """The kept crop tokens `[k, c]` out of all `[n, c]`, and the newline of every row of the merged map, kept or not."""
    n, c = tokens.shape
    ends = [(row, _BEHIND, n) for row in range(rows)]
    order = torch.tensor([which for _, _, which in sorted([(p.row, p.column, p.candidate) for p in places] + ends)])
    marked = (kept.unsqueeze(1) == torch.arange(n)).float().amax(dim=0)
    stays = torch.cat([marked, torch.ones(1)])[order].unsqueeze(0)
    everything = torch.cat([tokens, torch.full((1, c), _NEWLINE)])[order].unsqueeze(0)
    return gather(everything, keep_top(stays, kept.shape[0] + rows)[0])[0].to(torch.float16).float()


def build(case: Case) -> Program:
    pictures, n, width = case.inputs["feat"].shape
    side, grid = square(n), _grid(case)
    model: ModelFacts = facts(class_tokens=1)
    kept = None
    if "crops_fp16" in case.outputs:
        kept = case.outputs["crops_fp16"].shape[0] - grid[0] * side[0]
    size = case.params.get("size")
    share = float(case.params.get("ratio", 0.25))
    config = GlobalCom2.Config(
        keep=Budget(share=share),
        crop_tokens=kept,
        grid=grid,
        picture=None if size is None else (int(size[1]), int(size[0])),
        scores="previous",
    )
    (stage,) = GlobalCom2.stages(Site.parse("projector"), config, model)
    arriving = Layout(tuple(Segment("visual", n, side) for _ in range(pictures)), width)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens, score = inputs["feat"].reshape(1, -1, width), inputs["cls"].reshape(1, -1)
        out = GlobalCom2.apply(stage, tokens, context(tokens, arriving, model, {stage.needs[0]: score}), config)
        first = GlobalCom2.layout(stage, arriving, config, model).segments[0].tokens
        crops = _with_newlines(tokens[0], out.source[0, first:], map_of(arriving, config, stage.at, model).places, grid[0] * side[0])
        return {
            "scales": crop_scales(inputs["cls"][:1], side, grid, share)[0],
            "thumb": out.tokens[0, :first],
            "thumb_idx": out.source[0, :first],
            "crops_fp16": crops,
            "count": torch.tensor(first + crops.shape[0]),
        }

    return Program({name: case.tensor(name) for name in ("feat", "cls")}, run)
