"""Qwen's merger, the order of its patches, and Qwen2.5-VL's windows (those are the family's, `make_windows`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.goldens._cases import Case, NotCovered, Program
from tests.goldens.adapters._learned import all_inputs, model_of, projected, same_weights
from tmc_export.families._qwen_vision import Windows, make_windows
from tmc_export.graphs._contract import Site
from tmc_export.graphs._projector import unshuffle
from tmc_export.graphs.patch_merger import PatchMerger


def build(case: Case) -> Program:
    if "x" in case.inputs:
        return _merger(case)
    if "grid" in case.params:
        return _windows(case)
    if "grid_h" in case.params:
        return _order(case)
    raise NotCovered("neither an order, nor a merger, nor windows")


def _merger(case: Case) -> Program:
    """The golden's patches follow each other block by block; as a raster they are one row of blocks."""
    x, wide = case.tensor("x"), case.tensor("W.mlp.0.weight").shape[1]
    side = round((wide / x.shape[-1]) ** 0.5)
    blocks = x.shape[0] // side**2
    config = PatchMerger.Config(merge=side, norm="layer" if "W.ln_q.bias" in case.inputs else "rms")
    grid = (side, blocks * side)
    model = model_of(x.shape[-1], case.tensor("W.mlp.2.weight").shape[0], grid)
    same_weights(PatchMerger, config, model, case)
    (stage,) = PatchMerger.stages(Site.parse("projector.replace"), config, model)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raster = inputs["x"].reshape(blocks, side, side, -1).transpose(0, 1).reshape(1, x.shape[0], -1)
        return {"y": projected(PatchMerger, stage, config, model, grid, {**inputs, "x": raster})[0]}

    return Program(all_inputs(case), run)


def _order(case: Case) -> Program:
    """Which patches become one token: those that `unshuffle` joins."""
    h, w = int(case.params["grid_h"]), int(case.params["grid_w"])
    side = int(case.params.get("merge", 2))

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = unshuffle(inputs["patch"].reshape(1, h, w, 1), side).flatten(1, 2)[0]
        return {"order": groups.flatten(), "groups": groups}

    return Program({"patch": torch.arange(h * w)}, run)


def _windows(case: Case) -> Program:
    """Windows of every frame of every picture, one after the other."""
    side = int(case.params.get("window_size", 112)) // 2 // int(case.params.get("patch_size", 14))
    orders: list[Tensor] = []
    edges, units = [0], 0
    for frames, rows, columns in case.params["grid"]:
        for _ in range(frames):
            count = rows * columns // 4
            windows = make_windows((rows, columns), 2, side)
            orders.append((torch.arange(count) if windows is None else windows.order) + units)
            for size in [rows * columns] if windows is None else _sizes(windows, rows * columns):
                edges.append(edges[-1] + size)
            units += count
    order = torch.cat(orders)
    restore, cuts = order.argsort(), torch.tensor(edges)

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {"window_index": inputs["unit"][order], "cu_window_seqlens": inputs["edge"][cuts], "reverse": inputs["unit"][restore]}
        return {name: value for name, value in found.items() if name in case.outputs}

    return Program({"unit": torch.arange(units), "edge": torch.arange(edges[-1] + 1)}, run)


def _sizes(windows: Windows, patches: int) -> list[int]:
    """Patches of each window, read off the masks that the encoder uses."""
    if windows.mask is None:
        return [patches // windows.count] * windows.count
    seen = (windows.mask == 0).sum(dim=-1).flatten().tolist()
    if not windows.together:
        return [int(size) for size in seen]
    sizes: list[int] = []
    while sum(sizes) < patches:
        sizes.append(int(seen[sum(sizes)]))
    return sizes
