"""A Hugging Face model opened for the reference: its vision tower as two halves per layer, its decoder's modules.

Written against the model's own modules and their `forward` with eager attention; nothing here is shared with `surgery`.

Legend: b batch, n tokens, c channels, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tmc_export.core.errors import ModelError
from tmc_export.plan.types import VisionPlan
from tmc_export.verify._qwen_tower import QwenTower
from tmc_export.verify._stored import load_stored

__all__ = ["ReferenceModel", "Tower", "load_model"]


class Tower(Protocol):
    """A vision encoder and its projector."""

    layers: int

    def shape(self, plan: VisionPlan) -> tuple[int, ...]:
        """Shape of a picture prepared for a bucket, without a batch axis."""
        ...

    def generate_inputs(self, pixels: Sequence[Tensor], plans: Sequence[VisionPlan], group: Tensor) -> dict[str, Tensor]:
        """What `generate()` takes for these pictures in a prompt whose tokens belong to `group [T]`."""
        ...

    def raster(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """A prepared picture `[1, …]` as `[1, 3, H, W]`."""
        ...

    def embed(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        """A prepared picture `[1, …]`, or a raster `[1, 3, H, W]`, → tokens before the first layer `[1, n, c]`, class tokens first."""
        ...

    def attend(self, layer: int, tokens: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """First half of a layer, residual included, its attention weights `[b, h, n, n]` and its keys `[b, n, h, d]`."""
        ...

    def products(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's attention computes of these tokens: scaled products `[1, h, n, n]` before any bias, and keys `[1, n, h, d]`."""
        ...

    def feed_forward(self, layer: int, tokens: Tensor) -> Tensor:
        """Second half of a layer, residual included."""
        ...

    def in_raster(self, tokens: Tensor) -> Tensor:
        """All patches of a picture row by row, class tokens already dropped."""
        ...

    def project(self, tokens: Tensor) -> Tensor:
        """What the model does between the last layer in use and the decoder, class tokens already dropped."""
        ...


@dataclass(frozen=True)
class ReferenceModel:
    """A loaded model's parts.

    Attributes:
        whole: the Hugging Face model.
        tower: encoder and projector.
        text: the module with `embed_tokens`, `layers`, `norm` and `rotary_emb`.
        head: the output head.
        eos: token ids that end an answer.
    """

    whole: Any
    tower: Tower
    text: Any
    head: Any
    eos: tuple[int, ...]


class _ClipTower:
    """LLaVA's CLIP or SigLIP tower and two-layer projector."""

    def __init__(self, model: Any) -> None:
        self.vision = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        depth, wanted = len(self.vision.encoder.layers), model.config.vision_feature_layer
        self.layers = wanted if wanted >= 0 else depth + 1 + wanted  # hidden_states[0] is what enters the first layer
        size, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
        self.grid = (size // patch, size // patch)

    def shape(self, plan: VisionPlan) -> tuple[int, ...]:
        return (3, *plan.size)

    def generate_inputs(self, pixels: Sequence[Tensor], plans: Sequence[VisionPlan], group: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack(list(pixels))}

    def raster(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        return pixels

    def embed(self, pixels: Tensor, plan: VisionPlan) -> Tensor:
        tokens: Tensor = self.vision.embeddings(pixels, interpolate_pos_encoding=plan.grid != self.grid)
        return self.vision.pre_layrnorm(tokens) if hasattr(self.vision, "pre_layrnorm") else tokens

    def attend(self, layer: int, tokens: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        block = self.vision.encoder.layers[layer]
        normed = block.layer_norm1(tokens)
        bias = None if key_bias is None else key_bias[:, None, None, :].to(tokens.dtype)
        out, weights = block.self_attn(hidden_states=normed, attention_mask=bias)
        keys = block.self_attn.k_proj(normed).unflatten(-1, (-1, block.self_attn.head_dim))
        return tokens + out, weights, keys

    def products(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        block = self.vision.encoder.layers[layer]
        normed, attention = block.layer_norm1(tokens), block.self_attn
        query = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))
        key = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
        return torch.einsum("bqhd,bkhd->bhqk", query, key).float() * attention.scale, key

    def feed_forward(self, layer: int, tokens: Tensor) -> Tensor:
        block = self.vision.encoder.layers[layer]
        return tokens + block.mlp(block.layer_norm2(tokens))  # type: ignore[no-any-return]

    def in_raster(self, tokens: Tensor) -> Tensor:
        return tokens

    def project(self, tokens: Tensor) -> Tensor:
        return self.projector(tokens)  # type: ignore[no-any-return]


def load_model(folder: Path, dtype: torch.dtype) -> ReferenceModel:
    """Load a checkpoint with its own eager attention; local files only, none of the checkpoint's own code.

    A checkpoint that is quantized already becomes a model of the weights that its codes stand for.

    Raises:
        ModelError: the folder cannot be loaded, or its kind has no reference.
    """
    model: Any = load_stored(folder, dtype)
    if model is None:
        model = _load(folder, dtype)
    model.eval().requires_grad_(False)
    kind = str(model.config.model_type)
    towers: dict[str, Callable[[Any], Tower]] = {"llava": _ClipTower, "qwen2_vl": QwenTower, "qwen2_5_vl": QwenTower}
    if kind not in towers:
        raise ModelError(f"the reference has no path for model_type '{kind}'; it has one for: {', '.join(towers)}")
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    eos = tuple(int(i) for i in ends) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),)
    return ReferenceModel(model, towers[kind](model), model.model.language_model, model.lm_head, eos)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, attn_implementation="eager", dtype=dtype
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"the checkpoint in {folder} cannot be loaded: {reason}; fetch it again or give another folder") from error
    finally:
        if bar:
            logging.enable_progress_bar()
