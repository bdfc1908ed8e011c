"""LLaMA-VID: one token for what the question asks of the picture, and a few for the picture itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._attention import Shapes, attend, need_fewer
from tmc_export.graphs._checks import need_grid, need_site
from tmc_export.graphs._contract import (
    Compressed,
    Context,
    Layout,
    Method,
    MethodConfig,
    Need,
    Sample,
    Segment,
    Site,
    Stage,
    TextEmbeds,
    TextTower,
)
from tmc_export.graphs._projector import dense, dense_shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LlamaVid"]

_TEXT = TextEmbeds()


@register("llama_vid")
class LlamaVid(Method):
    """LLaMA-VID, a context token asked for by the text and pooled content tokens.

    Paper: "LLaMA-VID: An Image is Worth 2 Tokens in Large Language Models", ECCV 2024, arXiv:2311.17043.

    With V the patches `[n, c]`, T the text tokens, `Q = T Wq`, every projection with a bias where the checkpoint has one:

    - context: `value(mean over text tokens of softmax(Q key(V)^T / sqrt(c)) V)`, one token;
    - content: the means of V over windows of `h // grid` x `w // grid`, what fills no window left out, through the projector.

    The content is made in the projector's place, where no prompt is known, behind an empty row; V is handed on, and on the assembled
    embeddings, before any layer, the context fills that row.

    Shapes (b batch, n = h*w candidates, m text tokens, c encoder width, d decoder width): tokens `[b, n, c]` -> `[b, 1 + k, d]` at
    `projector.replace`, k the number of windows, with state `[b, n, c]`; `[b, 1 + k, d]` and text `[b, m, d]` -> `[b, 1 + k, d]` at
    `decoder.0`. The tokens are synthetic; `assign` names the content token of each candidate.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = LlamaVid.Config(grid=2)
    >>> stage, tokens, context = context_for(LlamaVid, config, "projector.replace", index=1, seed=0)
    >>> LlamaVid.apply(stage, tokens, context, config).tokens.shape[1:]
    torch.Size([5, 96])

    Limits: learned weights: `vlm_att_projector` (Wq), `vlm_att_key_projector`, `vlm_att_val_projector` and `mm_projector`, as in the
    checkpoint under `model.`. Padding is in no mean and seen by no query; a window of padding alone is padding. It takes the projector's
    place, so the model's own projector is not built.

    Where the official code differs: its text queries are the 32 outputs of a BERT with a tokenizer of its own that reads question and
    picture (`vlm_att_encoder`, not in this library); here they are the prompt's text embeddings, or the one embedding of a CLIP text
    tower, and Wq has their width. So its checkpoints bind except for `vlm_att_projector`. From the queries on the mathematics is the
    official one. A grid that does not divide the raster makes more windows than `grid` squared, as there: 14 over 6 is 7 a side. Its
    `compress_type` unset keeps every patch; `mean` is `grid: 1` here.
    """

    paper = "LLaMA-VID, ECCV 2024, arXiv:2311.17043"
    official = "dvlab-research/LLaMA-VID@222d8ea llamavid/model/llamavid_arch.py:token_generation"
    mechanism = "query"
    sites = ("projector.replace",)
    query_aware = True
    training_free = False

    samples = (
        Sample("projector.replace", {"grid": 3}, too_much={"grid": 9}),
        Sample("projector.replace", {"projector": "linear"}, too_much={"grid": 9}),
        Sample("projector.replace", {"tower": "a-text-encoder", "tower_width": 16, "grid": 2}, too_much={"grid": 9}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            grid: content tokens a side; 1 is the mean of all patches.
            projector: the content's projector: two linear layers with gelu between, or one.
            tower: hub id or folder of a CLIP checkpoint whose embedding of the question is the query; the prompt's own
                embeddings where not given.
            tower_width: channels of that embedding.
        """

        grid: int = Field(default=1, ge=1)
        projector: Literal["mlp2x_gelu", "linear"] = "mlp2x_gelu"
        tower: str | None = None
        tower_width: int = Field(default=512, ge=1)

    @staticmethod
    def stages(at: Site, config: LlamaVid.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """The content in the projector's place, the context on the assembled embeddings, which reads the text."""
        need_site("llama_vid", at, "projector.replace")
        return Stage(at), Stage(Site("decoder", 0), (_need(config),), 1, tied=True)

    @staticmethod
    def weights(config: LlamaVid.Config, facts: ModelFacts) -> Mapping[str, tuple[int, ...]]:
        """The three projections of the attention, and the projector."""
        c, d = facts.encoder.width, facts.decoder.width
        found: Shapes = dense_shapes("vlm_att_projector", config.tower_width if config.tower else d, c)
        found |= dense_shapes("vlm_att_key_projector", c, c) | dense_shapes("vlm_att_val_projector", c, d)
        if config.projector == "linear":
            return found | dense_shapes("mm_projector", c, d)
        return found | dense_shapes("mm_projector.0", c, d) | dense_shapes("mm_projector.2", d, d)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: LlamaVid.Config, facts: ModelFacts) -> Layout:
        """The context token, and the content's raster; the second cut changes no count."""
        if stage.index == 1:
            need_fewer("llama_vid", f"grid: {config.grid}", 1 + config.grid**2, layout.tokens, stage.at)
            return layout
        h, w = need_grid("llama_vid", layout, stage.at)
        if config.grid > min(h, w):
            raise ValueError(f"grid: {config.grid} is larger than the {h}x{w} raster at {stage.at}; lower it to at most {min(h, w)}")
        grid = tuple(_windows(side, config.grid)[1] for side in (h, w))
        if 1 + grid[0] * grid[1] > h * w:
            raise ValueError(
                f"grid: {config.grid} makes {grid[0] * grid[1]} content tokens and a context token of the {h * w} at {stage.at}; lower it"
            )
        return Layout((Segment("visual", 1), Segment("visual", grid[0] * grid[1], (grid[0], grid[1]))), facts.decoder.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: LlamaVid.Config) -> Compressed:
        """Pool the content, or ask for the context."""
        return _context(tokens, context, config) if stage.index == 1 else _content(stage, tokens, context, config)


def _content(stage: Stage, tokens: Tensor, context: Context, config: LlamaVid.Config) -> Compressed:
    """Return an empty row and the content tokens; the patches go on as state."""
    import torch
    from torch.nn import functional

    first, weights = context.layout.class_tokens, context.weights
    raster = need_grid("llama_vid", context.layout, stage.at)
    patches, valid = tokens[:, first:], context.valid[:, first:]
    window = _membership(raster, config.grid)
    count = window @ valid.float().unsqueeze(2)
    content = (window @ (patches.float() * valid.float().unsqueeze(2)) / count.clamp_min(1.0)).to(tokens.dtype)
    if config.projector == "linear":
        content = dense(content, weights, "mm_projector")
    else:
        content = dense(functional.gelu(dense(content, weights, "mm_projector.0")), weights, "mm_projector.2")
    b, k = tokens.shape[0], 1 + content.shape[1]
    some = valid.float().amax(dim=1, keepdim=True) > 0
    assign = torch.where(window.sum(dim=0) > 0, window.argmax(dim=0) + 1, -1)
    assign = torch.cat([torch.full((first,), -1, dtype=torch.int64), assign]).unsqueeze(0).expand(b, -1)
    return Compressed(
        torch.cat([torch.zeros_like(content[:, :1]), content], dim=1),
        torch.full((b, k), -1, dtype=torch.int64),
        torch.cat([some, count.squeeze(2) > 0], dim=1),
        assign=assign.contiguous(),
        state={"patches": patches, "seen": valid},
    )


def _context(tokens: Tensor, context: Context, config: LlamaVid.Config) -> Compressed:
    """Return the tokens with the context in their first row."""
    import torch

    asked = _asked(context.state["patches"], context.state["seen"], context, config)
    found = dense(asked, context.weights, "vlm_att_val_projector")
    index = torch.arange(tokens.shape[1]).unsqueeze(0).expand(tokens.shape[0], -1)
    return Compressed(torch.cat([found, tokens[:, 1:]], dim=1), index.contiguous(), context.valid)


def _need(config: LlamaVid.Config) -> Need:
    return TextTower(config.tower, config.tower_width) if config.tower else _TEXT


def _asked(patches: Tensor, valid: Tensor, context: Context, config: LlamaVid.Config) -> Tensor:
    """Return the mean over valid queries `[b, 1, c]` of what they read of the patches, before the value projection."""
    import torch

    need, weights = _need(config), context.weights
    if isinstance(need, TextTower):
        text = context.captured[need].unsqueeze(1)
        asking = torch.ones_like(text[:, :, 0], dtype=torch.float32)
    elif context.text is None or context.text_valid is None:
        raise ValueError("llama_vid at decoder.0 got no text embeddings (0 of 1 need met); capture TextEmbeds")
    else:
        text, asking = context.text, context.text_valid.float()
    queries = dense(text.to(patches.dtype), weights, "vlm_att_projector")
    read, _ = attend(queries, dense(patches, weights, "vlm_att_key_projector"), patches, 1, valid)
    share = asking / asking.sum(dim=1, keepdim=True).clamp_min(1.0)
    return (share.unsqueeze(1) @ read.float()).to(patches.dtype)


def _windows(side: int, grid: int) -> tuple[int, int]:
    """Return the side of a window and how many fit: `side // grid`, and `side` over that, rounded down."""
    stride = side // grid
    return stride, side // stride


def _membership(raster: tuple[int, int], grid: int) -> Tensor:
    """Return `[k, n]` float32, 1 where a candidate is in a window."""
    import torch

    lines = []
    for side in raster:
        stride, count = _windows(side, grid)
        cell = torch.arange(side) // stride
        lines.append((cell.unsqueeze(0) == torch.arange(count).unsqueeze(1)).float())
    rows, columns = lines
    both = rows.reshape(rows.shape[0], 1, -1, 1) * columns.reshape(1, columns.shape[0], 1, -1)
    return both.reshape(rows.shape[0] * columns.shape[0], -1)
