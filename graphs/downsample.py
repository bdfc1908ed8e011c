"""Plain down-sampling: the control that every compressing method is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_grid, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Downsample"]


@register("downsample")
class Downsample(Method):
    """Down-sampling, a control: the same count as a method, from a smaller picture.

    Paper: none; the baseline that decides whether a method is worth its trouble.

    With `grid = (R, C)` in patches of p pixels:

    - `at: input`: the picture of H x W pixels is resized to `R*p x C*p` with antialiasing: `out = M_rows X M_columns^T`, `M_ij`
      proportional to `max(0, 1 - |(i + 1/2) H/h - 1/2 - j| / max(H/h, 1))`, rows summing to 1; the encoder then runs on the smaller raster;
    - `at: projector`: the raster of tokens is resized to R x C by the share of each token that a new cell covers.

    Shapes (b batch, c channels): at `input` the candidates are pixels in raster rows, `[b, H*W, 3]` -> `[b, R*p*C*p, 3]`, and the
    layout's grid counts pixels; at `projector` `[b, h*w, c]` -> `[b, R*C, c]`. Computed in float32.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Downsample.Config(grid=(4, 4))
    >>> stage, tokens, context = context_for(Downsample, config, "input", seed=0)
    >>> Downsample.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (256, 1024)

    Limits: at `input` the encoder must take another raster (its position table is interpolated); the picture has already been resized to
    the bucket once. Pixels are the encoder's normalised ones, so the result is not rounded to 8 bits between the two.

    Where the official code differs: there is none; the weights are those of an antialiased bilinear resize.
    """

    paper = "none (control)"
    official = "paper only"
    mechanism = "control"
    sites = ("input", "projector")

    samples = (
        Sample("input", {"grid": (5, 3)}, too_much={"grid": (9, 3)}),
        Sample("projector", {"grid": (5, 3)}, too_much={"grid": (0, 3)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            grid: rows and columns that leave: of patches at `input`, of tokens at `projector`.
        """

        grid: tuple[int, int] = Field(description="rows and columns that leave")

    @staticmethod
    def stages(at: Site, config: Downsample.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("downsample", at, "input", "projector")
        merge = facts.encoder.merge
        if at.part == "input" and any(side % merge for side in config.grid):
            raise ValueError(
                f"grid: {list(config.grid)} does not divide into the {merge}x{merge} groups that the projector of "
                f"{facts.architecture} joins; "
                f"use multiples of {merge}"
            )
        return (Stage(at),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Downsample.Config, facts: ModelFacts) -> Layout:
        """The smaller raster, in pixels at `input`."""
        arriving = need_grid("downsample", layout, stage.at)
        unit = facts.encoder.patch if stage.at.part == "input" else 1
        grid = (config.grid[0] * unit, config.grid[1] * unit)
        if min(config.grid) < 1 or grid[0] > arriving[0] or grid[1] > arriving[1]:
            most = [side // unit for side in arriving]
            raise ValueError(f"grid: {list(config.grid)} is not within 1 and the {most} that arrive at {stage.at}; choose a grid inside it")
        return Layout((Segment("visual", grid[0] * grid[1], grid),), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Downsample.Config) -> Compressed:
        """Resample the raster by constant matrices."""
        import torch

        from tmc_export.graphs._raster import resample

        old = need_grid("downsample", context.layout, stage.at)
        new = need_grid("downsample", Downsample.layout(stage, context.layout, config, context.facts), stage.at)
        kind: Literal["antialias", "area"] = "antialias" if stage.at.part == "input" else "area"
        out = resample(tokens, old, new, kind)
        padding = resample((~context.valid).float().unsqueeze(2), old, new, kind).squeeze(2)
        centre = [((torch.arange(m) + 0.5) * (o / m)).long().clamp_max(o - 1) for o, m in zip(old, new, strict=True)]
        source = (centre[0].unsqueeze(1) * old[1] + centre[1].unsqueeze(0)).flatten()
        return Compressed(out, source.expand(tokens.shape[0], -1).contiguous(), padding <= 0)
