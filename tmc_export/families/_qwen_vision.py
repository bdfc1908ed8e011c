"""The encoder of Qwen2-VL and Qwen2.5-VL for one static patch grid: rotary tables and windows are constants.

Patches arrive in blocks of merge x merge, as the processor cuts them. Qwen2.5-VL also groups the blocks into windows before the first
layer and undoes it after the merger; where a window at the border is smaller, it is padded with masked keys.

Source: `modeling_qwen2_vl.py`, `modeling_qwen2_5_vl.py`, `vision_utils.py` of transformers 5.23.

Legend: b batch, n patches, u = n / merge² units, w windows, s patches of the largest window, h heads, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tmc_export.core.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tmc_export.families._contract import AttentionCore

__all__ = ["QwenVision", "Windows", "axial_rotary", "make_windows"]

_MASKED = -3.0e4
"""Added to a masked score: inside float16's range, and exp(-30000) is zero in every dtype."""


@dataclass(frozen=True)
class Windows:
    """Windows over a static grid of units, in patches.

    Attributes:
        order: `[u]` unit at each place of the grouped order.
        restore: `[u]` place of each unit in it.
        count: w.
        take: `[w·s]` patch behind each row of the padded windows; None where all windows have s patches.
        put: `[n]` row of each patch in the padded windows; None like `take`.
        mask: `[w, 1, 1, s]` (padded windows) or `[1, 1, n, n]` (all at once), 0 or `_MASKED`; None where nothing is masked.
        together: cheaper as one attention over all patches with `mask`.
    """

    order: Tensor
    restore: Tensor
    count: int
    take: Tensor | None
    put: Tensor | None
    mask: Tensor | None
    together: bool


def make_windows(grid: tuple[int, int], merge: int, side: int) -> Windows | None:
    """Cut a grid into windows, row by row; None where one window holds it all.

    Args:
        grid: patch rows and columns, multiples of `merge`.
        merge: patches per side of a unit.
        side: units per side of a window.
    """
    import torch

    rows, columns = grid[0] // merge, grid[1] // merge
    members: list[list[int]] = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            units = ((r, c) for r in range(top, min(top + side, rows)) for c in range(left, min(left + side, columns)))
            members.append([r * columns + c for r, c in units])
    if len(members) == 1:
        return None
    order = torch.tensor([unit for window in members for unit in window])
    sizes = [len(window) * merge * merge for window in members]
    patches, largest = sum(sizes), max(sizes)
    together = len(sizes) * largest**2 >= patches**2
    take = put = mask = None
    if together:
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        mask = torch.where(owner[:, None] == owner[None], 0.0, _MASKED)[None, None]
    elif min(sizes) < largest:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        take = torch.tensor([start + min(i, size - 1) for start, size in zip(starts, sizes, strict=True) for i in range(largest)])
        put = torch.tensor([w * largest + i for w, size in enumerate(sizes) for i in range(size)])
        mask = torch.tensor([[0.0] * size + [_MASKED] * (largest - size) for size in sizes])[:, None, None]
    return Windows(order, order.argsort(), len(sizes), take, put, mask, together)


def axial_rotary(grid: tuple[int, int], merge: int, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the two-axis rotary embedding, float32 `[n, d]`, patches in blocks of merge x merge.

    The first quarter of the angles turns with the row, the second with the column; the other half repeats them.

    Args:
        grid: patch rows and columns.
        merge: patches per side of a block.
        channels: d.
        theta: base of the frequencies.
    """
    import torch

    rows, columns = grid
    half = channels // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    blocks = (rows // merge, merge, columns // merge, merge)
    row, column = (
        axis.reshape(blocks).transpose(1, 2).flatten().float()[:, None] * frequencies
        for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    )
    angles = torch.cat([row, column, row, column], -1)
    return angles.cos(), angles.sin()


def _rotate(tensor: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn channel pairs (i, i + d/2): `[b, h, n, d]`, computed in float32 as the model does."""
    import torch

    wide = tensor.float()
    half = wide.shape[-1] // 2
    turned = torch.cat([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cosine + turned * sine).to(tensor.dtype)


class QwenVision:
    """Encoder and merger for one patch grid.

    Args:
        model: `Qwen2VLForConditionalGeneration` or `Qwen2_5_VLForConditionalGeneration`.
        size: height and width of the processor's picture.
        grid: patch rows and columns inside the encoder; fewer than the picture's after an `input` stage.
        windows: of the layers that do not see everything, or None.
        full: layers that see everything.
    """

    def __init__(
        self, model: nn.Module, size: tuple[int, int], grid: tuple[int, int], windows: Windows | None, full: frozenset[int]
    ) -> None:
        whole: Any = model
        self.tower: Any = whole.model.visual
        config = self.tower.config
        self.layers: int = len(self.tower.blocks)
        self.patches = grid[0] * grid[1]
        self._size, self._grid = size, grid
        self._patch, self._frames, self._merge = int(config.patch_size), int(config.temporal_patch_size), int(config.spatial_merge_size)
        self._unit = self._merge**2
        self._full = full
        self._windows = windows
        theta = float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0))
        attention = self.tower.blocks[0].attn
        self._heads, self._channels = int(attention.num_heads), int(attention.qkv.in_features) // int(attention.num_heads)
        cosine, sine = axial_rotary(grid, self._merge, self._channels, theta)
        if windows is not None:
            cosine, sine = (self._units(t[None], windows.order)[0] for t in (cosine, sine))
        self._cosine, self._sine = cosine, sine

    def _units(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Reorder whole units: `[b, n, c]` → `[b, n, c]`."""
        batch, count, width = tokens.shape
        return tokens.reshape(batch, count // self._unit, self._unit, width)[:, index].reshape(batch, count, width)

    def raster(self, pixels: Tensor) -> Tensor:
        """Put patches together again: `[b, n, 3·frames·patch²]` → `[b, 3, H, W]`, the first of the equal frames."""
        (height, width), side = self._size, self._patch * self._merge
        blocks = (pixels.shape[0], height // side, width // side, self._merge, self._merge, 3, self._frames, self._patch, self._patch)
        rows = pixels.reshape(blocks)[:, :, :, :, :, :, 0].permute(0, 5, 1, 3, 6, 2, 4, 7)
        return rows.reshape(pixels.shape[0], 3, height, width)

    def _cut(self, raster: Tensor) -> Tensor:
        """Cut a raster as the processor does: `[b, 3, H, W]` → `[b, n, values]`."""
        batch, (rows, columns) = raster.shape[0], self._grid
        blocks = (batch, 3, rows // self._merge, self._merge, self._patch, columns // self._merge, self._merge, self._patch)
        patches = raster.reshape(blocks).permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        return patches.expand(-1, -1, -1, -1, -1, -1, self._frames, -1, -1).reshape(batch, self.patches, -1)

    def embed(self, pixels: Tensor) -> Tensor:
        """`[b, n, values]` or a raster → `[b, n, c]`; the convolution's kernel is the patch, so it is one matrix product."""
        import torch

        if pixels.dim() == 4:
            pixels = self._cut(pixels)
        if pixels.dim() != 3 or pixels.shape[1] != self.patches:
            raise ExportError(f"the encoder was made for {self.patches} patches, it was given an input of shape {list(pixels.shape)}")
        weight = self.tower.patch_embed.proj.weight
        tokens = torch.nn.functional.linear(pixels.to(weight.dtype), weight.flatten(1))
        return tokens if self._windows is None else self._units(tokens, self._windows.order)

    def attend(self, layer: int, tokens: Tensor, core: AttentionCore) -> Tensor:
        """Normalise, attend within the layer's windows, project, add: `[b, n, c]` → `[b, n, c]`."""
        block = self.tower.blocks[layer]
        batch, count, width = tokens.shape
        if count != self.patches:
            raise ExportError(
                f"{count} tokens arrive at encoder layer {layer}, whose rotary positions are those of {self.patches} patches; "
                "this encoder's tokens are compressed at the projector or in the decoder"
            )
        joined = block.attn.qkv(block.norm1(tokens)).reshape(batch, count, 3, self._heads, self._channels)
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = (_rotate(t, self._cosine, self._sine) for t in (query, key))
        scaling = self._channels**-0.5
        windows = None if layer in self._full else self._windows
        if windows is None:
            mixed = core(query, key, value, scaling)
        elif windows.together:
            mixed = core(query, key, value, scaling, windows.mask)
        else:
            mixed = self._in_windows(windows, query, key, value, core)
        result: Tensor = tokens + block.attn.proj(mixed.transpose(1, 2).reshape(batch, count, width))
        return result

    def _in_windows(self, windows: Windows, query: Tensor, key: Tensor, value: Tensor, core: AttentionCore) -> Tensor:
        """Attention with the windows on the batch axis: `[b, h, n, d]` → `[b·w, h, s, d]` → `[b, h, n, d]`."""
        batch, heads, count, channels = query.shape

        def split(tensor: Tensor) -> Tensor:
            rows = tensor if windows.take is None else tensor[:, :, windows.take]
            return rows.reshape(batch, heads, windows.count, -1, channels).transpose(1, 2).flatten(0, 1)

        mask = None if windows.mask is None else windows.mask.repeat(batch, 1, 1, 1)
        mixed = core(split(query), split(key), split(value), channels**-0.5, mask)
        rows = mixed.reshape(batch, windows.count, heads, -1, channels).transpose(1, 2).reshape(batch, heads, -1, channels)
        return rows if windows.put is None else rows[:, :, windows.put]

    def feed_forward(self, layer: int, tokens: Tensor) -> Tensor:
        """Normalise, MLP, add: `[b, n, c]` → `[b, n, c]`."""
        block = self.tower.blocks[layer]
        result: Tensor = tokens + block.mlp(block.norm2(tokens))
        return result

    def finish(self, tokens: Tensor) -> Tensor:
        """The merger has the norm: nothing here."""
        return tokens

    def in_raster(self, tokens: Tensor) -> Tensor:
        """Put units back in their order, and the patches of each in its rows and columns: `[b, n, c]` → `[b, n, c]`."""
        if self._windows is not None:
            tokens = self._units(tokens, self._windows.restore)
        (rows, columns), side = self._grid, self._merge
        blocks = tokens.reshape(tokens.shape[0], rows // side, columns // side, side, side, -1)
        return blocks.transpose(2, 3).reshape(tokens.shape)

    def project(self, tokens: Tensor) -> Tensor:
        """Merge units and put them back in raster order: `[b, n, c]` → `[b, u, c']`."""
        batch = tokens.shape[0]
        merged: Tensor = self.tower.merger(tokens).reshape(batch, self.patches // self._unit, -1)
        return merged if self._windows is None else merged[:, self._windows.restore]
