"""Qwen2-VL's and Qwen2.5-VL's encoder for the reference: the model's own blocks called one by one, with the arguments that the model's own
`forward` gives them for a grid (rotary tables, borders of the attention, window order).

Those arguments are listened to, not computed: `forward` runs once per grid on patches that carry their own number.

Legend: n patches, u = n / merge² units, c channels, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.plan.types import VisionPlan

__all__ = ["QwenTower"]

_BASE = 1024
"""Patch numbers are written in two digits of this base, which float16 holds exactly."""


@dataclass(frozen=True)
class _Grid:
    """What the model's `forward` does on one grid.

    Attributes:
        order: `[n]` patch at each place of the sequence that the blocks see.
        restore: `[u]` place of each unit behind the merger.
        arguments: of every block.
    """

    order: Tensor
    restore: Tensor
    arguments: tuple[Mapping[str, Any], ...]


class QwenTower:
    """See `Tower`.

    Args:
        model: `Qwen2VLForConditionalGeneration` or `Qwen2_5_VLForConditionalGeneration`.
    """

    def __init__(self, model: Any) -> None:
        self.visual = model.model.visual
        config = self.visual.config
        self.layers = len(self.visual.blocks)
        self.patch, self.frames, self.merge = int(config.patch_size), int(config.temporal_patch_size), int(config.spatial_merge_size)
        self._turn = import_module(type(self.visual).__module__).apply_rotary_pos_emb_vision
        self._grids: dict[tuple[int, int], _Grid] = {}
        self._grid: _Grid | None = None
        self._size = (0, 0)

    def shape(self, plan: VisionPlan) -> tuple[int, ...]:
        """Patches, and the values of one."""
        rows, columns = plan.size[0] // self.patch, plan.size[1] // self.patch
        return rows * columns, 3 * self.frames * self.patch**2

    def generate_inputs(self, pixels: Sequence[Tensor], plans: Sequence[VisionPlan], group: Tensor) -> dict[str, Tensor]:
        """All patches in a row, the grid of each picture, and which tokens are a picture's."""
        grids = [(1, p.size[0] // self.patch, p.size[1] // self.patch) for p in plans]
        return {
            "pixel_values": torch.cat(list(pixels)),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": (group > 0).long()[None],
        }

    def _blocks_first(self, rows: int, columns: int) -> Tensor:
        """Raster index of each patch in the order of merge x merge blocks: `[n]`."""
        index = torch.arange(rows * columns).view(rows // self.merge, self.merge, columns // self.merge, self.merge)
        return index.transpose(1, 2).flatten()

    def raster(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """`[1, n, values]` → `[1, 3, H, W]`, the first of the equal frames."""
        first = pixels[0].view(-1, 3, self.frames, self.patch**2)[:, :, 0].flatten(1)
        there = self._blocks_first(plan.size[0] // self.patch, plan.size[1] // self.patch)
        columns = torch.empty_like(first)
        columns[there] = first
        return torch.nn.functional.fold(columns.T[None].float(), plan.size, self.patch, stride=self.patch).to(pixels.dtype)

    def _cut(self, raster: Tensor) -> Tensor:
        """`[1, 3, H, W]` → `[1, n, values]`, the picture repeated for every frame of a patch."""
        rows, columns = raster.shape[2] // self.patch, raster.shape[3] // self.patch
        patches = torch.nn.functional.unfold(raster.float(), self.patch, stride=self.patch)[0].T[self._blocks_first(rows, columns)]
        frames = patches.view(-1, 3, 1, self.patch**2).expand(-1, -1, self.frames, -1)
        return frames.reshape(1, patches.shape[0], -1).to(raster.dtype)

    def embed(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """Embed patches, or a raster that a stage at `input` left, and put them in the blocks' order."""
        patches = self._cut(pixels) if pixels.dim() == 4 else pixels
        self._grid = self._grids.get(plan.grid) or self._listen(plan.grid)
        self._grids[plan.grid], self._size = self._grid, plan.grid
        return self.visual.patch_embed(patches[0])[self._grid.order][None]  # type: ignore[no-any-return]

    def _listen(self, grid: tuple[int, int]) -> _Grid:
        """Run the model's own `forward` on numbered patches and note what its blocks get."""
        count = grid[0] * grid[1]
        heard: list[Mapping[str, Any]] = []
        seen: list[Tensor] = []

        def number(module: Any, arguments: Any, output: Tensor) -> Tensor:
            marked = torch.zeros_like(output)
            marked[:, 0], marked[:, 1] = torch.arange(count) // _BASE, torch.arange(count) % _BASE
            return marked

        def listen(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(arguments[0] if arguments else named["hidden_states"])
            heard.append({k: v for k, v in named.items() if k != "hidden_states"})

        hooks = [self.visual.patch_embed.register_forward_hook(number)]
        hooks += [block.register_forward_pre_hook(listen, with_kwargs=True) for block in self.visual.blocks]
        try:
            weight = next(self.visual.parameters())
            values = torch.zeros(count, 3 * self.frames * self.patch**2, dtype=weight.dtype)
            self.visual(values, grid_thw=torch.tensor([(1, *grid)]))
        finally:
            for hook in hooks:
                hook.remove()
        order = seen[0][:, 0].long() * _BASE + seen[0][:, 1].long()
        if len(heard) != self.layers or not torch.equal(order.sort().values, torch.arange(count)):
            raise ExportError(f"this transformers calls its vision blocks in another way than the reference follows, on a grid of {grid}")
        unit = self.merge**2
        return _Grid(order, (order[::unit] // unit).argsort(), tuple(heard))

    def attend(self, layer: int, tokens: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """First half of a block; the weights are zero between windows.

        Raises:
            ExportError: a stage changed the number of tokens inside the encoder, or their weight.
        """
        grid = self._grid
        if grid is None or key_bias is not None or tokens.shape[1] != grid.order.shape[0]:
            raise ExportError(
                f"{tokens.shape[1]} tokens arrive at encoder layer {layer}; this encoder's tokens cannot be cut before its merger"
            )
        block, arguments = self.visual.blocks[layer], grid.arguments[layer]
        normed = block.norm1(tokens[0])
        weights, keys = self._weights(block.attn, normed, arguments)
        return tokens + block.attn(normed, **arguments)[None], weights, keys

    def _weights(self, attention: Any, normed: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What the block's attention does not hand out: weights `[1, h, n, n]`, and keys after rotation `[1, n, h, d]`."""
        joined = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1))
        query, key = self._turn(joined[:, 0], joined[:, 1], *arguments["position_embeddings"])
        borders = arguments["cu_seqlens"]
        owner = torch.bucketize(torch.arange(normed.shape[0]), borders[1:], right=True)
        apart = torch.where(owner[:, None] == owner[None], 0.0, float("-inf"))
        logits = torch.einsum("qhd,khd->hqk", query, key).float() * attention.scaling + apart
        return logits.softmax(-1).to(normed.dtype)[None], key[None]

    def products(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Not served: every layer of this encoder is in use, and its tokens cannot be cut between them."""
        raise ExportError(f"the reference does not look ahead into layer {layer} of this encoder; ask for the layer before")

    def feed_forward(self, layer: int, tokens: Tensor) -> Tensor:
        """Second half of a block."""
        block = self.visual.blocks[layer]
        return tokens + block.mlp(block.norm2(tokens))  # type: ignore[no-any-return]

    def in_raster(self, tokens: Tensor) -> Tensor:
        """Every patch at its own row and column."""
        if self._grid is None:
            raise ExportError("no picture was embedded before its projection")
        placed = torch.empty_like(tokens)
        placed[:, self._blocks_first(*self._size)[self._grid.order]] = tokens
        return placed

    def project(self, tokens: Tensor) -> Tensor:
        """Merge units, and put them in raster order."""
        if self._grid is None:
            raise ExportError("no picture was embedded before its projection")
        return self.visual.merger(tokens[0])[self._grid.restore][None]  # type: ignore[no-any-return]
