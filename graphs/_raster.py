"""Resampling of token rasters by constant matrices, which every engine takes (Resize with antialiasing builds in none).

Legend: b batch, h w the raster, c channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["grid_matrix", "line_matrix", "resample"]

Kind = Literal["bilinear", "antialias", "area"]


def line_matrix(arriving: int, leaving: int, kind: Kind) -> Tensor:
    """Return the `[leaving, arriving]` float32 weights that resample a line; every row sums to 1.

    - `bilinear`: two neighbours around `(i + 1/2) * arriving / leaving - 1/2` (align_corners false, no antialiasing);
    - `antialias`: a triangle as wide as the step, as Pillow and `interpolate(antialias=True)` do;
    - `area`: the share of each cell that the new cell covers.

    Built from `arange`, so a trace holds arithmetic that constant folding removes.

    >>> line_matrix(4, 2, "area").tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    import torch

    step = arriving / leaving
    i = torch.arange(leaving, dtype=torch.float32).unsqueeze(1)
    j = torch.arange(arriving, dtype=torch.float32).unsqueeze(0)
    if kind == "area":
        covered = (torch.minimum((i + 1) * step, j + 1) - torch.maximum(i * step, j)).clamp_min(0.0)
        return covered / covered.sum(dim=1, keepdim=True)
    if kind == "bilinear":
        centre = ((i + 0.5) * step - 0.5).clamp(0.0, float(arriving - 1))
        return (1.0 - (centre - j).abs()).clamp_min(0.0)
    reach = max(step, 1.0)
    hat = (1.0 - ((i + 0.5) * step - 0.5 - j).abs() / reach).clamp_min(0.0)
    return hat / hat.sum(dim=1, keepdim=True)


def resample(tokens: Tensor, arriving: tuple[int, int], leaving: tuple[int, int], kind: Kind) -> Tensor:
    """Resample raster rows `[b, h*w, c]` to `[b, h'*w', c]` by one matrix per axis; computed in float32, returned in the tokens' dtype."""
    b, c = tokens.shape[0], tokens.shape[2]
    rows, columns = line_matrix(arriving[0], leaving[0], kind), line_matrix(arriving[1], leaving[1], kind)
    flat = rows @ tokens.float().reshape(b, arriving[0], arriving[1] * c)
    out = columns @ flat.reshape(b * leaving[0], arriving[1], c)
    return out.reshape(b, leaving[0] * leaving[1], c).to(tokens.dtype)


def grid_matrix(arriving: tuple[int, int], leaving: tuple[int, int], kind: Kind) -> Tensor:
    """Return the `[h'*w', h*w]` weights of `resample` as one matrix."""
    rows, columns = line_matrix(arriving[0], leaving[0], kind), line_matrix(arriving[1], leaving[1], kind)
    both = rows.reshape(leaving[0], 1, arriving[0], 1) * columns.reshape(1, leaving[1], 1, arriving[1])
    return both.reshape(leaving[0] * leaving[1], arriving[0] * arriving[1])
