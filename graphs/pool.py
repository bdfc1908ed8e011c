"""Pooling of the visual raster: average, max or bilinear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_grid, need_raster_encoder, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pool"]


@register("pool")
class Pool(Method):
    """Pooling, a raster of fewer tokens from windows of `kernel` x `kernel`.

    Papers: "Matryoshka Multimodal Models", ICLR 2025, arXiv:2405.17430 (average, after the projector); "LLaVA-OneVision", TMLR 2025,
    arXiv:2408.03326 (bilinear, video); "DeCo", arXiv:2405.20985 (average, before the projector: `at: encoder`).

    - `average`, `max`: over windows that do not overlap; what does not fill a window is left out: `(h // s) x (w // s)`;
    - `bilinear`: `ceil(h / s) x ceil(w / s)` points, align_corners false, no antialiasing: with `z = (i + 1/2) * h / h' - 1/2`, clamped
      to the raster, the two neighbours of z weighted `1 - |z - j|`.

    Shapes (b batch, n = h*w candidates, k = h'*w', c channels): tokens `[b, n, c]` -> `[b, k, c]`, computed in float32. Class tokens pass
    unchanged. `mix` is the matrix itself (not for `max`), `assign` the window of each candidate, `source` the candidate at the window's
    centre.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Pool.Config(kernel=2, mode="average")
    >>> stage, tokens, context = context_for(Pool, config, "projector", seed=0)
    >>> Pool.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (16, 64)

    Limits: needs a raster, so it cannot follow a method that selects. A window that touches padding is padding.

    Where the official code differs: M3 takes `kernel = int(sqrt(n / tokens))`, which misses a count that is no square (50 -> 64 of 576);
    here the kernel is the option. LLaVA-OneVision adds a newline token per row for video; that belongs to the prompt, not to the pooling.
    """

    paper = "Matryoshka Multimodal Models, ICLR 2025, arXiv:2405.17430; LLaVA-OneVision, TMLR 2025, arXiv:2408.03326"
    official = "mu-cai/matryoshka-mm@ec30cd3, LLaVA-VL/LLaVA-NeXT@df17966 llava/model/llava_arch.py:get_2dPool"
    mechanism = "transform"
    sites = ("projector", "encoder", "encoder.<l>")

    samples = (
        Sample("projector", too_much={"kernel": 9}),
        Sample("projector", {"mode": "max"}),
        Sample("projector", {"mode": "bilinear", "kernel": 3}),
        Sample("encoder", {"kernel": 3}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            kernel: side of the window, in tokens.
            mode: average, max or bilinear.
        """

        kernel: int = Field(default=2, ge=1)
        mode: Literal["average", "max", "bilinear"] = "average"

    @staticmethod
    def stages(at: Site, config: Pool.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("pool", at, "projector", "encoder")
        need_raster_encoder("pool", at, facts)
        return (Stage(at),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Pool.Config, facts: ModelFacts) -> Layout:
        """The class tokens and the smaller raster."""
        h, w = need_grid("pool", layout, stage.at)
        s = config.kernel
        if s > min(h, w):
            raise ValueError(f"kernel: {s} is larger than the {h}x{w} raster at {stage.at}; lower it to at most {min(h, w)}")
        grid = (-(-h // s), -(-w // s)) if config.mode == "bilinear" else (h // s, w // s)
        kept = tuple(segment for segment in layout.segments if segment.kind == "class")
        return Layout((*kept, Segment("visual", grid[0] * grid[1], grid)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Pool.Config) -> Compressed:
        """Pool the raster; class tokens pass."""
        import torch

        from tmc_export.graphs._raster import with_class

        out = Pool.layout(stage, context.layout, config, context.facts)
        first, b = context.layout.class_tokens, tokens.shape[0]
        old, new = need_grid("pool", context.layout, stage.at), need_grid("pool", out, stage.at)
        pooled = torch.cat([tokens[:, :first], _pool(tokens[:, first:], old, new, config)], dim=1)
        matrix = with_class(_weights(old, new, config), first)
        padding = (matrix > 0).float() @ (~context.valid).float().unsqueeze(2)
        source, assign = _places(old, new, first, config)
        return Compressed(
            pooled,
            source.expand(b, -1).contiguous(),
            padding.squeeze(2) == 0,
            assign=assign.expand(b, -1).contiguous(),
            mix=None if config.mode == "max" else matrix.expand(b, -1, -1).contiguous(),
        )


def _pool(visual: Tensor, old: tuple[int, int], new: tuple[int, int], config: Pool.Config) -> Tensor:
    """Pool raster rows `[b, h*w, c]`."""
    from torch.nn import functional

    from tmc_export.graphs._raster import resample

    if config.mode == "bilinear":
        return resample(visual, old, new, "bilinear")
    b, c = visual.shape[0], visual.shape[2]
    image = visual.float().reshape(b, *old, c).permute(0, 3, 1, 2)
    pool = functional.max_pool2d if config.mode == "max" else functional.avg_pool2d
    return pool(image, config.kernel).flatten(2).transpose(1, 2).to(visual.dtype)


def _weights(old: tuple[int, int], new: tuple[int, int], config: Pool.Config) -> Tensor:
    """Return the `[h'*w', h*w]` matrix; for `max` that of the average, whose support is the same."""
    from torch.nn import functional

    from tmc_export.graphs._raster import grid_matrix

    if config.mode == "bilinear":
        return grid_matrix(old, new, "bilinear")
    s = config.kernel
    full = grid_matrix((new[0] * s, new[1] * s), new, "area").reshape(-1, new[0] * s, new[1] * s)
    return functional.pad(full, (0, old[1] - new[1] * s, 0, old[0] - new[0] * s)).reshape(-1, old[0] * old[1])


def _places(old: tuple[int, int], new: tuple[int, int], first: int, config: Pool.Config) -> tuple[Tensor, Tensor]:
    """Return the static `source` `[k]` and `assign` `[n]`."""
    import torch

    step = [o / m if config.mode == "bilinear" else float(config.kernel) for o, m in zip(old, new, strict=True)]
    centre = [((torch.arange(m) + 0.5) * s).long().clamp_max(o - 1) for o, m, s in zip(old, new, step, strict=True)]
    window = [((torch.arange(o) + 0.5) / s).long() for o, s in zip(old, step, strict=True)]
    rows, columns = window[0].unsqueeze(1), window[1].unsqueeze(0)
    inside = (rows < new[0]) & (columns < new[1])
    assign = torch.where(inside, rows * new[1] + columns + first, torch.full_like(rows, -1)).flatten()
    source = (centre[0].unsqueeze(1) * old[1] + centre[1].unsqueeze(0)).flatten() + first
    head = torch.arange(first)
    return torch.cat([head, source]), torch.cat([head, assign])
