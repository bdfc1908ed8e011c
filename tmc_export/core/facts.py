"""What a plan knows of a model before any weight is read: plain numbers out of its configuration."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DecoderFacts", "EncoderFacts", "ModelFacts"]


@dataclass(frozen=True)
class EncoderFacts:
    """A vision encoder.

    Attributes:
        layers: transformer blocks that run for the features in use (a feature layer of -2 leaves the last one out).
        width: channels of a token.
        heads: attention heads.
        intermediate: channels inside the feed-forward part.
        patch: side of a patch, in pixels.
        class_tokens: tokens before the patches (1 for CLIP, 0 for SigLIP and Qwen2-VL).
        merge: patches per side that the projector joins into one token (2 for Qwen2-VL, else 1).
        grid: patch rows and columns of one picture of the bucket.
        spare: blocks of the checkpoint behind those in use; a method may score with the first of them (`Attention(layer="next")`).
    """

    layers: int
    width: int
    heads: int
    intermediate: int
    patch: int
    class_tokens: int
    merge: int
    grid: tuple[int, int]
    spare: int = 0

    @property
    def tokens(self) -> int:
        """Tokens inside the encoder for one picture, class tokens included."""
        return self.class_tokens + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class DecoderFacts:
    """A causal decoder.

    Attributes:
        layers, width, heads, kv_heads, head_dim, intermediate, vocabulary: as in the configuration.
        rope_axes: 1, or 3 under M-RoPE (time, row, column).
        tied: the output head is the token table.
        context: the longest sequence the model was made for.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    rope_axes: int
    tied: bool
    context: int


@dataclass(frozen=True)
class ModelFacts:
    """A multimodal model, for one picture bucket.

    Attributes:
        family: the registered family, e.g. `"llava"`.
        architecture: the Hugging Face class name.
        encoder, decoder: the two parts.
        visual_grid: rows and columns of the tokens that leave the projector uncompressed.
        image_token: the token id that stands for one visual token in a prompt.
    """

    family: str
    architecture: str
    encoder: EncoderFacts
    decoder: DecoderFacts
    visual_grid: tuple[int, int]
    image_token: int

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one picture when nothing is compressed."""
        return self.visual_grid[0] * self.visual_grid[1]
