"""LLaVA: a CLIP or SigLIP tower, a two-layer projector, and a Llama, Mistral, Qwen2 or Qwen3 decoder.

Source: `models/llava/modeling_llava.py` of transformers 5.23; paper: "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmc_export.core.errors import ModelError
from tmc_export.core.facts import EncoderFacts, ModelFacts
from tmc_export.core.image_rule import ImageRule
from tmc_export.families import register_family
from tmc_export.families._contract import DecoderParts, Family, ModelFiles, TokenRules, VisionParts
from tmc_export.families._defaults import decoder_facts, decoder_windows, filled
from tmc_export.families._parts import ClipLikeEncoder, HuggingFaceDecoder

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Llava"]


def _feature_layers(config: Any, layers: int) -> int:
    """Return how many encoder layers run for the configured feature layer (-2, LLaVA-1.5's, leaves the last one out)."""
    wanted = config.get("vision_feature_layer", -2)
    if not isinstance(wanted, int):
        raise ModelError(f"vision_feature_layer is {wanted!r}: features of several layers are not served; a single layer such as -2 is")
    used = wanted if wanted >= 0 else layers + 1 + wanted
    if not 1 <= used <= layers:
        raise ModelError(f"vision_feature_layer {wanted} is not one of the encoder's {layers} layers; correct config.json")
    return used


@register_family("llava")
class Llava(Family):
    """`LlavaForConditionalGeneration`."""

    architectures = ("LlavaForConditionalGeneration",)
    model_types = ("llava",)
    fits = ("crop", "resize", "letterbox")

    @staticmethod
    def default_size(files: ModelFiles) -> tuple[int, int]:
        """The encoder's own square."""
        side = int(filled(files.config["vision_config"], "encoder")["image_size"])
        return side, side

    @staticmethod
    def facts(files: ModelFiles, size: tuple[int, int], grid: tuple[int, int] | None = None) -> ModelFacts:
        """Read config.json; the picture has the encoder's own size, a smaller `grid` comes from an `input` stage."""
        config = files.config
        vision = filled(config["vision_config"], "encoder")
        text = filled(config["text_config"], "decoder")
        patch, side = int(vision["patch_size"]), int(vision["image_size"])
        if size != (side, side):
            raise ModelError(
                f"image_size {list(size)} does not suit this LLaVA, whose encoder has {side // patch}x{side // patch} position embeddings; "
                f"write image_size: [{side}, {side}] (smaller pictures: method downsample at input)"
            )
        rows, columns = grid or (side // patch, side // patch)
        class_tokens = 1 if vision["model_type"] == "clip_vision_model" else 0
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise ModelError(f"vision_feature_select_strategy {strategy!r} is not served; 'default' and 'full' are")
        if class_tokens and strategy == "full":
            raise ModelError("vision_feature_select_strategy 'full' keeps the class token as a visual token: not served; 'default' is")
        if not class_tokens and strategy == "default":
            raise ModelError(
                "vision_feature_select_strategy 'default' drops the first patch of an encoder without a class token; use 'full'"
            )
        depth = int(vision["num_hidden_layers"])
        used = _feature_layers(config, depth)
        return ModelFacts(
            family="llava",
            architecture="LlavaForConditionalGeneration",
            encoder=EncoderFacts(
                layers=used,
                width=int(vision["hidden_size"]),
                heads=int(vision["num_attention_heads"]),
                intermediate=int(vision["intermediate_size"]),
                patch=patch,
                class_tokens=class_tokens,
                merge=1,
                grid=(rows, columns),
                spare=depth - used,
            ),
            decoder=decoder_facts(text, tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))),
            visual_grid=(rows, columns),
            image_token=int(config.get("image_token_index", config.get("image_token_id", 32000))),
        )

    @staticmethod
    def image_rule(files: ModelFiles, size: tuple[int, int], fit: str | None) -> ImageRule:
        """The checkpoint's own processor (shortest edge, then the centre, for CLIP), or the recipe's `fit`."""
        return ImageRule.from_processor(files.processor or files.preprocessor, height=size[0], width=size[1], fit=fit)

    @staticmethod
    def tokens(files: ModelFiles) -> TokenRules:
        """The image token, and every id that ends an answer."""
        ends = files.generation.get("eos_token_id")
        if ends is None:  # absent, or written as null
            ends = files.config["text_config"].get("eos_token_id")
        ends = 2 if ends is None else ends
        image = int(files.config.get("image_token_index", files.config.get("image_token_id", 32000)))
        return TokenRules(image=image, eos=tuple(int(i) for i in ends) if isinstance(ends, list) else (int(ends),), image_text="<image>")

    @staticmethod
    def windows(files: ModelFiles) -> tuple[int | None, ...]:
        """Sliding windows of Mistral and Qwen2 decoders."""
        return decoder_windows(filled(files.config["text_config"], "decoder"))

    @staticmethod
    def vision(model: nn.Module, size: tuple[int, int], grid: tuple[int, int]) -> VisionParts:
        """Tower and projector; position embeddings are interpolated when `grid` is not the tower's own."""
        return _LlavaVision(model, grid)

    @staticmethod
    def decoder(model: nn.Module) -> DecoderParts:
        """The language model and its head."""
        whole: Any = model
        return HuggingFaceDecoder(whole.model.language_model, whole.lm_head, axes=1)


class _LlavaVision(ClipLikeEncoder):
    def __init__(self, model: Any, grid: tuple[int, int]) -> None:
        config = model.config
        layers = _feature_layers({"vision_feature_layer": config.vision_feature_layer}, config.vision_config.num_hidden_layers)
        super().__init__(model.model.vision_tower, layers)
        side = config.vision_config.image_size // config.vision_config.patch_size
        self.interpolate = grid != (side, side)
        self.projector = model.model.multi_modal_projector

    def raster(self, pixels: Tensor) -> Tensor:
        """The processor gives a raster."""
        return pixels

    def embed(self, pixels: Tensor) -> Tensor:
        """`[b, 3, H, W]` → `[b, n, c]`, class token first where the tower has one."""
        tokens: Tensor = self.tower.embeddings(pixels, interpolate_pos_encoding=self.interpolate)
        return self.tower.pre_layrnorm(tokens) if hasattr(self.tower, "pre_layrnorm") else tokens

    def finish(self, tokens: Tensor) -> Tensor:
        """LLaVA takes the features of a layer as they are: no norm."""
        return tokens

    def in_raster(self, tokens: Tensor) -> Tensor:
        """The tower's patches stand row by row."""
        return tokens

    def project(self, tokens: Tensor) -> Tensor:
        """Linear, activation, linear: `[b, n, c]` → `[b, n, c']`."""
        projected: Tensor = self.projector(tokens)
        return projected
