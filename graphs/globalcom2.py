"""GlobalCom2: a thumbnail says how much each high-resolution crop may keep, and helps to say what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_class_token, need_site
from tmc_export.graphs._contract import Attention, Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CropMap", "GlobalCom2", "Place", "crop_scales", "map_of"]

_TEMPERATURE = 10.0
_CROPPED = Layout(tuple(Segment("visual", 64, (8, 8)) for _ in range(5)), 96)


@dataclass(frozen=True)
class Place:
    """A crop token that is not padding.

    Attributes:
        row, column: where it stands in the merged map, as the official code lays it out.
        candidate: its index among the candidates.
        crop: its crop.
        inner: its index in the map without padding.
    """

    row: int
    column: int
    candidate: int
    crop: int
    inner: int


@dataclass(frozen=True)
class CropMap:
    """The crops as one picture.

    Attributes:
        places: the tokens that are not padding, in the order in which they leave.
        inner: rows and columns of the map without padding.
        thumbnail, kept: tokens of the thumbnail and of all crops that stay.
    """

    places: tuple[Place, ...]
    inner: tuple[int, int]
    thumbnail: int
    kept: int


@register("globalcom2")
class GlobalCom2(Method):
    """GlobalCom2, budgets for crops from the thumbnail, selection in the crops by both.

    Paper: "Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration", AAAI 2026, arXiv:2501.05179.

    With s the products of the class token's query with the keys *before softmax*, averaged over heads, of the layer after the features,
    each picture by itself, and r = keep: of the thumbnail's N tokens the `floor(N r)` of the largest s stay, in falling order. For crop p
    of P: `u_p = sum of the thumbnail's s over the crop's part of it`, `q = exp((u - max u) / 10)`, `q = q / (sum q + 1e-8)`,
    `scale_p = min(1, r (1 + q_p - 1/P sum q))`. The tokens of a crop (those on padding left out, N_p remain) are ranked by
    `s / max(|s|, 1e-12) + g / max(|g|, 1e-12)`, norms over the crop, g the thumbnail's s enlarged bilinearly to the unpadded map. Crop p
    keeps its `N_p scale_p` best, rounded by largest remainder to `crop_tokens` in all; they leave row by row of the merged map.

    Shapes (b pictures, n = (1 + P) N candidates: the thumbnail's, then each crop's in reading order, c channels): tokens `[b, n, c]` ->
    `[b, k, c]`, k = thumbnail's + crops'; s `[b, n]` and everything derived from it in float32.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = GlobalCom2.Config(scores="previous")
    >>> stage, tokens, context = context_for(GlobalCom2, config, "projector", arriving=GlobalCom2.samples[0].arriving)
    >>> GlobalCom2.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (80, 320)

    Limits: one candidate run per picture must hold thumbnail and crops, as `1 + rows * columns` visual segments with equal rasters;
    families that lay pictures out like that (LLaVA-NeXT) are not served yet, and a plan for any other model is refused. A token that
    ends each row of the merged map is the family's to add, behind the last kept token of the row, which `map_of` and `source` name. The
    selection is by raw products, so a crop's scores may be negative.

    Where the official code differs: it keeps `floor(N_p scale_p)` per crop, a count that is left to the data; with the sum of these counts
    as `crop_tokens` the same tokens come out. Where a picture is padded, it writes the rest of each crop from the crop's first place on, so
    that rows of the merged map shift against the picture: reproduced, because it decides the order and the rows' ends. It casts the crops'
    tokens to half precision. Ties go to the lowest index.
    """

    paper = "Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration, AAAI 2026, arXiv:2501.05179"
    official = (
        "xuyang-liu16/GlobalCom2@96b2d00 llava/model/llava_arch.py:compress_thumbnail, compress_crops, generate_scale_for_crop_features"
    )
    mechanism = "attention"
    sites = ("projector",)
    budgets = "tokens of all crops together"

    samples = (
        Sample("projector", {"scores": "previous"}, arriving=_CROPPED),
        Sample("projector", {"scores": "previous", "keep": 9, "picture": (300, 480), "crop_tokens": 41}, arriving=_CROPPED),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the thumbnail's tokens that stay; the share is also what crops keep on average.
            crop_tokens: tokens of all crops together that stay; `keep`'s share of those that are not padding when left out.
            grid: rows and columns of crops.
            picture: height and width, in any unit, of the picture that was fitted into the crops with padding; none when left out.
            scores: the layer of the products: `next`, behind the features (the official one), or `previous`.
        """

        keep: Budget = Budget(share=0.25)
        crop_tokens: int | None = Field(default=None, ge=1)
        grid: tuple[int, int] = (2, 2)
        picture: tuple[int, int] | None = None
        scores: Literal["next", "previous"] = "next"

    @staticmethod
    def stages(at: Site, config: GlobalCom2.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, after the projector, where the crops of a picture stand side by side."""
        need_site("globalcom2", at, "projector")
        need_class_token("globalcom2", facts)
        if min(config.grid) < 1 or (config.picture is not None and min(config.picture) < 1):
            raise ValueError(f"grid: {list(config.grid)} and picture: {config.picture} count from 1; correct them")
        if config.scores == "next" and facts.encoder.spare < 1:
            raise ValueError(
                f"globalcom2 scores with the layer after the features, and {facts.architecture} uses all {facts.encoder.layers} layers of "
                "its encoder; set scores: previous"
            )
        return (Stage(at, (Attention(layer=config.scores, rows="cls", heads="mean", logits=True),)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: GlobalCom2.Config, facts: ModelFacts) -> Layout:
        """The thumbnail's tokens, then those of all crops."""
        found = map_of(layout, config, stage.at, facts)
        return Layout((Segment("visual", found.thumbnail), Segment("visual", found.kept)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: GlobalCom2.Config) -> Compressed:
        """Choose in the thumbnail, share out the crops' budget, choose in the crops."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top, top_in_order

        found = map_of(context.layout, config, stage.at, context.facts)
        score = torch.where(context.valid, context.captured[stage.needs[0]].float(), 0.0)
        small = context.layout.segments[0].tokens
        first = top_in_order(score[:, :small], found.thumbnail, context.valid[:, :small])
        scales = crop_scales(score[:, :small], context.layout.segments[0].grid or (0, 0), config.grid, _share(config, small))
        area = torch.tensor([place.candidate for place in found.places])
        wanted = _priorities(score, scales, context, config, found)
        kept = keep_top(wanted, found.kept, context.valid[:, area])[0]
        source = torch.cat([first, gather(area.expand(kept.shape[0], -1), kept)], dim=1)
        return Compressed(gather(tokens, source), source, gather(context.valid, source))


def _share(config: GlobalCom2.Config, small: int) -> float:
    return config.keep.share or (config.keep.tokens or 0) / small


def map_of(layout: Layout, config: GlobalCom2.Config, at: Site, facts: ModelFacts) -> CropMap:
    """Lay the crops out as one map and count what stays; raises `ValueError` when no thumbnail and crops arrive or too few tokens do."""
    rows, columns = config.grid
    rasters = {s.grid for s in layout.segments}
    grid = layout.segments[0].grid
    if len(layout.segments) != 1 + rows * columns or len(rasters) != 1 or grid is None or layout.class_tokens:
        raise ValueError(
            f"globalcom2 needs a thumbnail and {rows}x{columns} crops of one raster each at {at}, {1 + rows * columns} runs of tokens, and "
            f"{len(layout.segments)} arrives: {facts.architecture} does not lay a picture out in crops, or grid is wrong; use a model that "
            "does, or a method for one picture, such as vispruner"
        )
    height, width = grid
    top, left, bottom, right = box = _inside(config.picture, rows * height, columns * width)
    places = sorted(_places(box, grid, columns), key=lambda place: (place.row, place.column))
    small = height * width
    thumbnail = kept_of(config.keep, small, at, "floor")
    kept = config.crop_tokens or int(_share(config, small) * len(places))
    if not 1 <= kept <= len(places):
        raise ValueError(f"crop_tokens: {kept} of the {len(places)} crop tokens at {at} that are not padding; choose 1 to {len(places)}")
    return CropMap(tuple(places), (bottom - top, right - left), thumbnail, kept)


def _places(box: tuple[int, int, int, int], crop: tuple[int, int], columns: int) -> list[Place]:
    """List the tokens inside the box, given as top, left, bottom and right of the merged map, in reading order.

    The official code writes a crop's unpadded tokens one after another from the crop's first place on, in rows of the full width.
    """
    (top, left, bottom, right), (height, width), found = box, crop, []
    for r in range(top, bottom):
        for c in range(left, right):
            (i, y), (j, x) = divmod(r, height), divmod(c, width)
            first_row, first_column = max(top - i * height, 0), max(left - j * width, 0)
            narrow = min(right - j * width, width) - first_column
            down, along = divmod((y - first_row) * narrow + x - first_column, width)
            candidate = (1 + i * columns + j) * height * width + y * width + x
            inner = (r - top) * (right - left) + c - left
            found.append(Place(i * height + down, j * width + along, candidate, i * columns + j, inner))
    return found


def _inside(picture: tuple[int, int] | None, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right of the map that are not padding, as LLaVA-NeXT pads: equally on both sides of one axis."""
    if picture is None:
        return 0, 0, rows, columns
    height, width = picture
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return pad, 0, rows - pad, columns
    pad = (columns - int(width * (rows / height))) // 2
    return 0, pad, rows, columns - pad


def crop_scales(score: Tensor, small: tuple[int, int], grid: tuple[int, int], share: float) -> Tensor:
    """Return the share `[b, P]` float32 of each crop's tokens that stays, from the thumbnail's products `[b, N]`.

    >>> import torch
    >>> [round(v, 3) for v in crop_scales(torch.tensor([[10.0, 0.0]]), (1, 2), (1, 2), 0.25)[0].tolist()]
    [0.308, 0.192]
    """
    import torch

    step = [max(side // parts, 1) for side, parts in zip(small, grid, strict=True)]
    part = [min(r // step[0], grid[0] - 1) * grid[1] + min(c // step[1], grid[1] - 1) for r in range(small[0]) for c in range(small[1])]
    member = (torch.tensor(part).unsqueeze(1) == torch.arange(grid[0] * grid[1])).float()
    total = score @ member
    weight = ((total - total.amax(dim=1, keepdim=True)) / _TEMPERATURE).exp()
    weight = weight / (weight.sum(dim=1, keepdim=True) + 1e-8)
    return (share * (1.0 + weight - weight.mean(dim=1, keepdim=True))).clamp_max(1.0)


def _priorities(score: Tensor, scales: Tensor, context: Context, config: GlobalCom2.Config, found: CropMap) -> Tensor:
    """Return what `[b, A]` to keep first of the map: the room its crop has left when the better ones of the crop are in.

    The best `sum of floor(N_p scale_p)` of these are the official choice; further ones fall to the crops with the largest remainders.
    """
    import torch
    from torch.nn import functional

    from tmc_export.graphs._ops import normalize, rank

    b, small = score.shape[0], context.layout.segments[0].grid or (0, 0)
    thumbnail = score[:, : small[0] * small[1]].reshape(b, 1, *small)
    wide = functional.interpolate(thumbnail, size=found.inner, mode="bilinear", align_corners=False).flatten(1)
    parts, order = [], []
    for p in range(config.grid[0] * config.grid[1]):
        mine = [i for i, place in enumerate(found.places) if place.crop == p]
        if not mine:
            continue
        at = torch.tensor([found.places[i].candidate for i in mine])
        valid = context.valid[:, at]
        around = torch.where(valid, wide[:, torch.tensor([found.places[i].inner for i in mine])], 0.0)
        both = normalize(score[:, at], 1e-12) + normalize(around, 1e-12)
        parts.append(len(mine) * scales[:, p : p + 1] - 1.0 - rank(both, valid).float())
        order += mine
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts, dim=1)[:, torch.tensor(back)]
