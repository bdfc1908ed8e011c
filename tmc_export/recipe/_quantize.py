"""How the parts of a model are stored and computed: the models of a recipe's `quantize`.

What a device takes, what is built and what needs calibration is no matter of the form: `plan/quantization.py` refuses that.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tmc_export.recipe._schemes import ACTIVATION_PARTS, BLOCKS_OF, PARTS_OF, ActivationScheme, WeightScheme, check_scheme

__all__ = ["Calibration", "Quantize", "QuantizePart"]

Text = Annotated[str, Field(min_length=1)]
_PERCENTILE = 99.99


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class QuantizePart(_Strict):
    """How the weights of one part are stored, and what its products multiply them with.

    Attributes:
        weights: the scheme.
        activations: what the inputs of products are rounded to; absent: they stay as they are (weight-only).
        block: consecutive weights that share a scale; for int4, and 16 for nvfp4.
        algorithm: how int4 codes are found: to the nearest, or with calibration.
        smooth: share of the activations' range that is moved into the weights; for int8 weights and activations.
        keep: names (or parts of names) of linear layers that stay in the base precision.
    """

    weights: Annotated[WeightScheme, BeforeValidator(check_scheme)] = Field(description="the weight scheme")
    activations: ActivationScheme | None = Field(default=None, description="what inputs of products are rounded to; absent: weight-only")
    block: Literal[16, 32, 64, 128] | None = Field(default=None, description="weights that share a scale, for int4 and nvfp4")
    algorithm: Literal["rtn", "awq", "gptq"] = Field(default="rtn", description="how int4 codes are found: rtn is to the nearest")
    smooth: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="SmoothQuant's alpha, for int8 with int8")
    keep: tuple[Text, ...] = Field(default=(), description="layers that stay in the base precision")

    @model_validator(mode="after")
    def _fits(self) -> QuantizePart:
        self._check_block()
        weights = {"weights": self.weights}
        if self.activations not in (None, self.weights):
            raise PydanticCustomError(
                "activations",
                "activations: {activations} goes with weights: {activations}, not with {weights}; write both alike, or remove activations",
                {"activations": self.activations, **weights},
            )
        if self.algorithm != "rtn" and self.weights != "int4":
            raise PydanticCustomError(
                "algorithm",
                "algorithm: {algorithm} is for weights: int4, got {weights}; remove it",
                {"algorithm": self.algorithm, **weights},
            )
        if self.smooth is not None and (self.weights, self.activations) != ("int8", "int8"):
            raise PydanticCustomError(
                "smooth", "smooth moves the activations' range into int8 weights; write weights: int8, activations: int8, or remove it"
            )
        return self

    def _check_block(self) -> None:
        blocks = BLOCKS_OF.get(self.weights, ())
        names = {"weights": self.weights, "block": self.block, "blocks": " or ".join(map(str, blocks))}
        if self.weights == "int4" and self.block is None:
            raise PydanticCustomError("block", "weights: int4 needs a block; add block: 32, 64 or 128")
        if self.block is None or self.block in blocks:
            return
        if not blocks:
            raise PydanticCustomError("block", "weights: {weights} takes no block; remove it", names)
        raise PydanticCustomError("block", "weights: {weights} has blocks of {blocks}, got block: {block}", names)


def _check_part(name: str) -> AfterValidator:
    def check(part: QuantizePart | None) -> QuantizePart | None:
        if part is None:
            return None
        context = {"weights": part.weights, "name": name, "parts": ", ".join(PARTS_OF[part.weights])}
        if name not in PARTS_OF[part.weights]:
            raise PydanticCustomError("part", "weights: {weights} is built for {parts} only, not for {name}; use fp16 here", context)
        if part.activations is not None and name not in ACTIVATION_PARTS:
            parts = ", ".join(ACTIVATION_PARTS)
            raise PydanticCustomError("part", "activations are those of {parts}, not of {name}; remove it", context | {"parts": parts})
        if name == "kv" and part.keep:
            raise PydanticCustomError("part", "keep names layers, and kv has none; remove it")
        return part

    return AfterValidator(check)


class Calibration(_Strict):
    """The data that static activation ranges, awq and gptq are found on.

    Attributes:
        images: a folder of pictures, relative to the recipe; may be absent only where `inputs.images` is 0.
        prompts: a file with one JSON object a line, relative to the recipe.
        samples: prompts at most.
        observer: how a range is found in what was seen.
        percentile: share of the magnitudes that the range holds, in per cent; for `observer: percentile`, 99.99 when absent.
    """

    images: Text | None = Field(default=None, description="a folder of pictures, relative to the recipe file")
    prompts: Text = Field(description="a file of prompts, one JSON object a line, relative to the recipe file")
    samples: Annotated[int, Field(ge=1, le=1_000_000)] = Field(default=32, description="prompts at most")
    observer: Literal["minmax", "percentile", "entropy", "mse"] = Field(default="minmax", description="how a range is found")
    percentile: Annotated[float, Field(gt=50, le=100)] | None = Field(
        default=None, description="per cent of the magnitudes inside the range, for observer: percentile; 99.99 when absent"
    )

    @model_validator(mode="after")
    def _percentile_belongs_to_its_observer(self) -> Calibration:
        if self.percentile is not None and self.observer != "percentile":
            raise PydanticCustomError(
                "percentile", "percentile has no effect with observer: {observer}; write observer: percentile, or remove it",
                {"observer": self.observer},
            )  # fmt: skip
        return self

    @property
    def percentile_used(self) -> float:
        """The percentile, with its default."""
        return _PERCENTILE if self.percentile is None else self.percentile


class Quantize(_Strict):
    """The quantization of each part; a part that is not named keeps the model's dtype."""

    encoder: Annotated[QuantizePart | None, _check_part("encoder")] = None
    projector: Annotated[QuantizePart | None, _check_part("projector")] = None
    decoder: Annotated[QuantizePart | None, _check_part("decoder")] = None
    head: Annotated[QuantizePart | None, _check_part("head")] = None
    kv: Annotated[QuantizePart | None, _check_part("kv")] = None
    calibration: Calibration | None = Field(default=None, description="data for static activation ranges, awq and gptq")

    def part(self, name: str) -> QuantizePart | None:
        """Return the scheme of a part; None where it keeps the model's dtype."""
        found = getattr(self, name)
        return found if isinstance(found, QuantizePart) else None
