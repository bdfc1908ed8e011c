"""Qwen2.5-VL: Qwen2-VL with an encoder of RMS norms and gated MLPs that attends within windows except in a few layers.

Source: `models/qwen2_5_vl/modeling_qwen2_5_vl.py` of transformers 5.23; paper: "Qwen2.5-VL Technical Report", arXiv 2502.13923.
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
from tmc_export.families._qwen_vision import QwenVision, make_windows

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Qwen2_5VL"]

_TEXT, _VISION = "qwen2_5_vl_text", "qwen2_5_vl_vision"


@register_family("qwen2_5_vl")
class Qwen2_5VL(Family):
    """`Qwen2_5_VLForConditionalGeneration`."""

    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    model_types = ("qwen2_5_vl",)
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
            family="qwen2_5_vl",
            architecture="Qwen2_5_VLForConditionalGeneration",
            encoder=EncoderFacts(
                layers=int(vision["depth"]),
                width=int(vision["hidden_size"]),
                heads=int(vision["num_heads"]),
                intermediate=int(vision["intermediate_size"]),
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
        """Time, row and column; for still pictures as in Qwen2-VL (only video counts time differently)."""
        return "mrope"

    @staticmethod
    def windows(files: ModelFiles) -> tuple[int | None, ...]:
        """Sliding windows, where the checkpoint switches them on."""
        return decoder_windows(common.text_config(files, _TEXT))

    @staticmethod
    def vision(model: nn.Module, size: tuple[int, int], grid: tuple[int, int]) -> VisionParts:
        """The encoder with its windows, cut for this grid."""
        whole: Any = model
        config = whole.config.vision_config
        merge = int(config.spatial_merge_size)
        windows = make_windows(grid, merge, int(config.window_size) // merge // int(config.patch_size))
        return QwenVision(model, size, grid, windows, frozenset(config.fullatt_block_indexes))

    @staticmethod
    def decoder(model: nn.Module) -> DecoderParts:
        """The language model and its head; `positions [3, b, T]`."""
        whole: Any = model
        return HuggingFaceDecoder(whole.model.language_model, whole.lm_head, axes=3)
