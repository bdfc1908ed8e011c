"""Resampling of token rasters by constant matrices, which every engine takes (Resize with antialiasing builds in none).

Legend: b batch, h w the raster, c channels, k tokens that leave, n candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tmc_export.graphs._contract import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cells", "grid_matrix", "line_matrix", "need_inside", "resample", "with_class"]

Kind = Literal["bilinear", "antialias", "area", "adaptive"]
Grid = tuple[int, int]


def line_matrix(arriving: int, leaving: int, kind: Kind) -> Tensor:
    """Return the `[leaving, arriving]` float32 weights that resample a line; every row sums to 1.

    - `bilinear`: two neighbours around `(i + 1/2) * arriving / leaving - 1/2` (align_corners false, no antialiasing);
    - `antialias`: a triangle as wide as the step, as Pillow and `interpolate(antialias=True)` do;
    - `area`: the share of each cell that the new cell covers;
    - `adaptive`: the mean of `floor(i * arriving / leaving)` to `ceil((i + 1) * arriving / leaving)`, windows that overlap where the
      step is no whole number, as `AdaptiveAvgPool` has them.

    Built from `arange`, so a trace holds arithmetic that constant folding removes.

    >>> line_matrix(4, 2, "area").tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    >>> line_matrix(3, 2, "adaptive").tolist()
    [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    import torch

    step = arriving / leaving
    i = torch.arange(leaving, dtype=torch.float32).unsqueeze(1)
    j = torch.arange(arriving, dtype=torch.float32).unsqueeze(0)
    if kind == "adaptive":
        first = torch.tensor([row * arriving // leaving for row in range(leaving)]).unsqueeze(1)
        end = torch.tensor([-(-(row + 1) * arriving // leaving) for row in range(leaving)]).unsqueeze(1)
        inside = ((j >= first) & (j < end)).float()
        return inside / inside.sum(dim=1, keepdim=True)
    if kind == "area":
        covered = (torch.minimum((i + 1) * step, j + 1) - torch.maximum(i * step, j)).clamp_min(0.0)
        return covered / covered.sum(dim=1, keepdim=True)
    if kind == "bilinear":
        centre = ((i + 0.5) * step - 0.5).clamp(0.0, float(arriving - 1))
        return (1.0 - (centre - j).abs()).clamp_min(0.0)
    reach = max(step, 1.0)
    hat = (1.0 - ((i + 0.5) * step - 0.5 - j).abs() / reach).clamp_min(0.0)
    return hat / hat.sum(dim=1, keepdim=True)


def resample(tokens: Tensor, arriving: Grid, leaving: Grid, kind: Kind) -> Tensor:
    """Resample raster rows `[b, h*w, c]` to `[b, h'*w', c]` by one matrix per axis; computed in float32, returned in the tokens' dtype."""
    b, c = tokens.shape[0], tokens.shape[2]
    rows, columns = line_matrix(arriving[0], leaving[0], kind), line_matrix(arriving[1], leaving[1], kind)
    flat = rows @ tokens.float().reshape(b, arriving[0], arriving[1] * c)
    out = columns @ flat.reshape(b * leaving[0], arriving[1], c)
    return out.reshape(b, leaving[0] * leaving[1], c).to(tokens.dtype)


def grid_matrix(arriving: Grid, leaving: Grid, kind: Kind) -> Tensor:
    """Return the `[h'*w', h*w]` weights of `resample` as one matrix."""
    rows, columns = line_matrix(arriving[0], leaving[0], kind), line_matrix(arriving[1], leaving[1], kind)
    both = rows.reshape(leaving[0], 1, arriving[0], 1) * columns.reshape(1, leaving[1], 1, arriving[1])
    return both.reshape(leaving[0] * leaving[1], arriving[0] * arriving[1])


def with_class(matrix: Tensor, first: int) -> Tensor:
    """Put an identity for `first` class tokens before a matrix: `[k, n]` to `[first + k, first + n]`."""
    import torch
    from torch.nn import functional

    if not first:
        return matrix
    top = torch.eye(first, first + matrix.shape[1])
    return torch.cat([top, functional.pad(matrix, (first, 0))])


def cells(arriving: Grid, leaving: Grid) -> tuple[Tensor, Tensor]:
    """Return the candidate at the middle of each new cell `[k]` and the new cell of each candidate `[n]`, int64.

    >>> [t.tolist() for t in cells((1, 4), (1, 2))]
    [[1, 3], [0, 0, 1, 1]]
    """
    import torch

    middle = [[(2 * i + 1) * o // (2 * m) for i in range(m)] for o, m in zip(arriving, leaving, strict=True)]
    cell = [[(2 * j + 1) * m // (2 * o) for j in range(o)] for o, m in zip(arriving, leaving, strict=True)]
    source = [row * arriving[1] + column for row in middle[0] for column in middle[1]]
    assign = [row * leaving[1] + column for row in cell[0] for column in cell[1]]
    return torch.tensor(source), torch.tensor(assign)


def need_inside(grid: Grid, arriving: Grid, at: Site) -> None:
    """Raise `ValueError` unless a `grid` option lies between 1x1 and the raster that arrives."""
    if min(grid) < 1 or grid[0] > arriving[0] or grid[1] > arriving[1]:
        raise ValueError(
            f"grid: {list(grid)} is not within [1, 1] and the {list(arriving)} tokens that arrive at {at}; choose a grid inside it"
        )
