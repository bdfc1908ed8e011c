"""The family contract: what the rest of tmc-export may know of a Hugging Face architecture.

The first half answers from plain JSON, without torch, for the plan. The second half takes a model whose weights may be
fake and hands out its parts as functions over tensors, for surgery.

Legend: b batch, n tokens, c channels, h heads, d channels of a head, T new tokens, r rotary axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from tmc_export.core.facts import ModelFacts
from tmc_export.core.image_rule import ImageRule

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["AttentionCore", "DecoderParts", "Family", "ModelFiles", "PositionRule", "TokenRules", "VisionParts"]

PositionRule = Literal["sequential", "mrope"]


class AttentionCore(Protocol):
    """Attention without projections; may capture its operands, and adds a key bias."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
        """All `[b, h, n, d]`; `mask` is additive and broadcasts to `[b, h, n, n]`. A layer with windows may put them on the batch axis."""
        ...


@dataclass(frozen=True)
class ModelFiles:
    """The small JSON files of a checkpoint, parsed; an absent one is an empty mapping."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    processor: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    tokenizer: Mapping[str, Any]


@dataclass(frozen=True)
class TokenRules:
    """Token ids the runtime needs.

    Attributes:
        image: stands for one visual token.
        eos: any of these ends an answer.
        image_text: what a prompt writes for one picture, e.g. `"<image>"`.
    """

    image: int
    eos: tuple[int, ...]
    image_text: str


class VisionParts(Protocol):
    """An encoder and its projector for one static bucket; weights may be fake."""

    layers: int

    def raster(self, pixels: Tensor) -> Tensor:
        """The processor's `[b, 3, H, W]` or `[b, patches, values]` → `[b, 3, H, W]`, for stages at `input`."""
        ...

    def embed(self, pixels: Tensor) -> Tensor:
        """What the processor or `raster` (then a stage) gives → tokens `[b, n, c]` before the first layer, class tokens first."""
        ...

    def attend(self, layer: int, tokens: Tensor, core: AttentionCore) -> Tensor:
        """First half of a layer, residual included: `[b, n, c]` → `[b, n, c]`."""
        ...

    def feed_forward(self, layer: int, tokens: Tensor) -> Tensor:
        """Second half of a layer, residual included: `[b, n, c]` → `[b, n, c]`."""
        ...

    def finish(self, tokens: Tensor) -> Tensor:
        """What the model applies between the last layer in use and the projector (a final norm, or nothing): `[b, n, c]`."""
        ...

    def in_raster(self, tokens: Tensor) -> Tensor:
        """All patches `[b, n, c]` in the encoder's own order → row by row, for a method that replaces the projector."""
        ...

    def project(self, tokens: Tensor) -> Tensor:
        """The projector, class tokens already dropped: `[b, n, c]` → `[b, n', c']`."""
        ...


class DecoderParts(Protocol):
    """A causal decoder; its layers run with the attention function that surgery registered."""

    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    embed: nn.Module

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `positions [r, b, T]`."""
        ...

    def run(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """One whole layer: `[b, T, c]` → `[b, T, c]`."""
        ...

    def attention_only(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Input norm and self-attention of a layer, for what the attention function records; the result is dropped."""
        ...


class Family:
    """Base of all families; never instantiated.

    Attributes:
        name: set by registration.
        architectures: Hugging Face class names served.
        model_types: `model_type` values served when a configuration names no architecture.
        fits: bucket rules a photograph may be brought to the bucket with; the first is the default.
        several_buckets: one bundle may hold several picture sizes.
    """

    name: ClassVar[str] = ""
    architectures: ClassVar[tuple[str, ...]]
    model_types: ClassVar[tuple[str, ...]]
    fits: ClassVar[tuple[str, ...]]
    several_buckets: ClassVar[bool] = False

    @staticmethod
    def default_size(files: ModelFiles) -> tuple[int, int]:
        """Height and width of the bucket when the recipe names none."""
        raise NotImplementedError

    @staticmethod
    def facts(files: ModelFiles, size: tuple[int, int], grid: tuple[int, int] | None = None) -> ModelFacts:
        """The model's numbers for one bucket; `grid` when an `input` stage changed the patch grid.

        Raises:
            ModelError: the size does not suit the model, or the variant is not served.
        """
        raise NotImplementedError

    @staticmethod
    def image_rule(files: ModelFiles, size: tuple[int, int], fit: str | None) -> ImageRule:
        """How a photograph becomes the bucket's input."""
        raise NotImplementedError

    @staticmethod
    def tokens(files: ModelFiles) -> TokenRules:
        """Token ids for the runtime."""
        raise NotImplementedError

    @staticmethod
    def position_rule(files: ModelFiles) -> PositionRule:
        """How rotary positions of a prompt with pictures are counted."""
        return "sequential"

    @staticmethod
    def windows(files: ModelFiles) -> tuple[int | None, ...]:
        """Per decoder layer: the sliding window in tokens, or None."""
        raise NotImplementedError

    @staticmethod
    def vision(model: nn.Module, size: tuple[int, int], grid: tuple[int, int]) -> VisionParts:
        """The encoder and projector, for pictures of `size` pixels whose patch grid is `grid`."""
        raise NotImplementedError

    @staticmethod
    def decoder(model: nn.Module) -> DecoderParts:
        """The decoder."""
        raise NotImplementedError
