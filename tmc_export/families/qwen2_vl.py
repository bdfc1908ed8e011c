"""Qwen2-VL: a ViT with two-axis rotary positions at any resolution, a 2x2 merger, and a Qwen2 decoder with M-RoPE.

Source: `models/qwen2_vl/modeling_qwen2_vl.py` of transformers 5.23; paper: "Qwen2-VL", arXiv 2409.12191.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmc_export.core.facts import EncoderFacts, ModelFacts
from tmc_export.core.image_rule import ImageRule
from tmc_export.families import _qwen_files as common
from tmc_export.families import register_family
from tmc_export.families._contract import DecoderParts, Family, ModelFiles, PositionRule, TokenRules, VisionParts
from tmc_export.families._defaults import decoder_windows
from tmc_export.families._parts import HuggingFaceDecoder
from tmc_export.families._qwen_vision import QwenVision

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Qwen2VL"]

_TEXT, _VISION = "qwen2_vl_text", "qwen2_vl_vision"


@register_family("qwen2_vl")
class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration`."""

    architectures = ("Qwen2VLForConditionalGeneration",)
    model_types = ("qwen2_vl",)
    fits = ("resize", "crop", "letterbox")
    several_buckets = True

    @staticmethod
    def default_size(files: ModelFiles) -> tuple[int, int]:
        """448x448 pixels, within the processor's limits."""
        return common.default_size(files, common.vision_config(files, _VISION))

    @staticmethod
    def facts(files: ModelFiles, size: tuple[int, int], grid: tuple[int, int] | None = None) -> ModelFacts:
        """Read config.json; any size of whole merged patches."""
        vision = common.vision_config(files, _VISION)
        rows, columns = common.check_size(vision, size, grid)
        merge = int(vision["spatial_merge_size"])
        return ModelFacts(
            family="qwen2_vl",
            architecture="Qwen2VLForConditionalGeneration",
            encoder=EncoderFacts(
                layers=int(vision["depth"]),
                width=int(vision["embed_dim"]),
                heads=int(vision["num_heads"]),
                intermediate=int(vision["embed_dim"] * vision["mlp_ratio"]),
                patch=int(vision["patch_size"]),
                class_tokens=0,
                merge=merge,
                grid=(rows, columns),
            ),
            decoder=common.mrope_decoder_facts(files, _TEXT),
            visual_grid=(rows // merge, columns // merge),
            image_token=int(files.config.get("image_token_id", common.IMAGE_TOKEN)),
        )

    @staticmethod
    def image_rule(files: ModelFiles, size: tuple[int, int], fit: str | None) -> ImageRule:
        """Stretched to the bucket unless the recipe says otherwise, then cut into patches."""
        return common.image_rule(files, common.vision_config(files, _VISION), size, fit)

    @staticmethod
    def tokens(files: ModelFiles) -> TokenRules:
        """The image token between its start and end tokens, and every id that ends an answer."""
        return common.token_rules(files, _TEXT)

    @staticmethod
    def position_rule(files: ModelFiles) -> PositionRule:
        """Time, row and column."""
        return "mrope"

    @staticmethod
    def windows(files: ModelFiles) -> tuple[int | None, ...]:
        """Sliding windows, where the checkpoint switches them on."""
        return decoder_windows(common.text_config(files, _TEXT))

    @staticmethod
    def vision(model: nn.Module, size: tuple[int, int], grid: tuple[int, int]) -> VisionParts:
        """The encoder, every layer of which sees the whole picture."""
        return QwenVision(model, size, grid, None, frozenset())

    @staticmethod
    def decoder(model: nn.Module) -> DecoderParts:
        """The language model and its head; `positions [3, b, T]`."""
        whole: Any = model
        return HuggingFaceDecoder(whole.model.language_model, whole.lm_head, axes=3)
