"""Pixel unshuffle: the pure operation, as the method with an identity for a projection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, Program
from tests.goldens.adapters._context import square
from tests.goldens.adapters._learned import model_of, projected
from tmc_export.graphs._contract import Site
from tmc_export.graphs.pixel_unshuffle import PixelUnshuffle


def _factor(case: Case) -> int:
    """Idefics3 writes the factor, InternVL one over it."""
    scale = float(case.params.get("scale", case.params.get("scale_factor", 0.5)))
    return round(scale) if scale >= 1 else round(1 / scale)


def build(case: Case) -> Program:
    x = case.tensor("x")
    grid = square(x.shape[1]) if x.dim() == 3 else (x.shape[1], x.shape[2])
    order = "v1" if case.params.get("ver") == "v1" else "v2"
    config = PixelUnshuffle.Config(factor=_factor(case), order=order, projection="idefics3")
    width = x.shape[-1] * config.factor**2
    model = model_of(x.shape[-1], width, grid)
    (stage,) = PixelUnshuffle.stages(Site.parse("projector.replace"), config, model)
    (name,) = PixelUnshuffle.weights(config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {"x": inputs["x"].reshape(x.shape[0], grid[0] * grid[1], x.shape[-1]), f"W.{name}": torch.eye(width)}
        tokens = projected(PixelUnshuffle, stage, config, model, grid, given)
        found = {"tokens": tokens}
        if "y" in case.outputs:
            rows, columns = grid[0] // config.factor, grid[1] // config.factor
            found["y"] = tokens.reshape(x.shape[0], *((columns, rows) if order == "v1" else (rows, columns)), width)
        return found

    return Program({"x": x}, run, {"hf_equal": "whether two official codes agree, which says nothing of ours"})
