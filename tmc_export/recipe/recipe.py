"""What a recipe may say: the models of schema `recipe: 1`. Validating one needs neither torch nor the methods."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tmc_export.recipe._origin import Origin, Origins, Path
from tmc_export.recipe._quantize import Quantize, QuantizePart

__all__ = ["Compress", "Inputs", "ModelSource", "Quantize", "QuantizePart", "Recipe", "Target", "WeightsSource"]

_METHOD = r"^[a-z0-9][a-z0-9_-]*$"
_SLUG = r"^[a-z0-9][a-z0-9._-]*$"
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Size = tuple[int, int]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


def _check_slug(value: str) -> str:
    if not re.fullmatch(_SLUG, value):
        raise PydanticCustomError("slug", "must be lower-case letters, digits, '.', '_' and '-', got '{got}'", {"got": value})
    return value


def _check_method(value: str) -> str:
    if not re.fullmatch(_METHOD, value):
        raise PydanticCustomError("method", "must be a registered name such as fastv, never a module path, got '{got}'", {"got": value})
    return value


Slug = Annotated[str, AfterValidator(_check_slug), Field(json_schema_extra={"pattern": _SLUG})]
MethodName = Annotated[str, AfterValidator(_check_method), Field(json_schema_extra={"pattern": _METHOD})]
Text = Annotated[str, Field(min_length=1)]


def _size(value: object) -> Size | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    height, width = value
    if type(height) is not int or type(width) is not int or not 1 <= min(height, width) <= max(height, width) <= 65_535:
        return None
    return height, width


def _read_image_size(value: object) -> Size | tuple[Size, ...] | None:
    """Turn YAML lists into tuples; one message for both forms instead of one per form."""
    one = _size(value)
    if value is None or one is not None:
        return one
    several = tuple(_size(size) for size in value) if isinstance(value, (list, tuple)) else ()
    sizes = tuple(size for size in several if size is not None)
    if sizes and len(sizes) == len(several):
        return sizes
    got = json.dumps(value, default=str)[:60]
    raise PydanticCustomError("image_size", "must be [height, width] in pixels, or a list of such buckets, got {got}", {"got": got})


def _same(value: object) -> object:
    return value


_SIDE: dict[str, JsonValue] = {"type": "integer", "minimum": 1, "maximum": 65_535}
_SIZE_SCHEMA: dict[str, JsonValue] = {"type": "array", "items": dict(_SIDE), "minItems": 2, "maxItems": 2}
ImageSize = Annotated[
    Size | tuple[Size, ...] | None,
    PlainValidator(_read_image_size),
    PlainSerializer(_same),
    WithJsonSchema({"anyOf": [_SIZE_SCHEMA, {"type": "array", "items": _SIZE_SCHEMA, "minItems": 1}, {"type": "null"}]}),
]


def _check_option(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        raise PydanticCustomError("option", "a method's option is a value or a list, got a mapping; write its keys beside 'method'")
    return value


class ModelSource(_Strict):
    """The checkpoint: a folder (relative to the recipe file) or a hub id, and the precision of the base graphs."""

    source: Text = Field(description="a hub id such as llava-hf/llava-1.5-7b-hf, or a folder relative to the recipe file")
    revision: Text | None = Field(default=None, description="branch, tag or commit of a hub id")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float16", description="precision of weights that are not quantized")


class Inputs(_Strict):
    """The input budget of one conversation; every static shape follows from it.

    Attributes:
        images: pictures at most.
        image_size: `[height, width]` in pixels or a list of such buckets; the model's own size when absent.
        fit: how a picture of another shape gets into the bucket; the family's own rule when absent.
        text_tokens: text tokens of all prompts together.
        new_tokens: generated tokens, all turns together.
        chunk: tokens a pass for later turns and chunked prefill.
        batch: conversations at once.
        turns: whether a later turn sees what the first one selected, or all is computed again.
    """

    images: int = Field(default=1, ge=0, le=1_000, description="pictures in one conversation, at most")
    image_size: ImageSize = Field(default=None, description="[height, width] in pixels, or a list of such buckets")
    fit: Literal["crop", "resize", "letterbox"] | None = Field(default=None, description="how a picture gets into its bucket")
    text_tokens: Count = Field(description="text tokens of all prompts in a conversation")
    new_tokens: Count = Field(description="generated tokens in a conversation")
    chunk: Count = Field(default=64, description="tokens a pass for later turns and chunked prefill")
    batch: Count = Field(default=1, description="conversations at once")
    turns: Literal["freeze", "recompute"] = Field(default="freeze", description="what later turns do about earlier selections")

    @property
    def buckets(self) -> tuple[Size, ...]:
        """The picture sizes `(height, width)`, in the recipe's order; empty when the model's own size is meant."""
        one = _size(self.image_size)
        return (one,) if one is not None else tuple(size for size in self.image_size or () if isinstance(size, tuple))


class WeightsSource(_Strict):
    """Where the learned weights of a method come from: a safetensors file, or random numbers (to see shapes, memory and times).

    Attributes:
        file: relative to the recipe, as folders in `model.source` are.
        prefix: what stands before the method's names in the file.
        random: a seed; such weights were never trained, so that answers mean nothing.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {"file": {"type": "string"}}, "required": ["file"]},
                {"properties": {"random": {"type": "integer"}}, "required": ["random"]},
            ]
        }
    )

    file: Text | None = Field(default=None, description="a safetensors file, relative to the recipe file")
    prefix: str = Field(default="", description="prefix of the names in the file")
    random: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = Field(default=None, description="seed of random weights, instead of a file")

    @model_validator(mode="after")
    def _one_source(self) -> WeightsSource:
        if (self.file is None) == (self.random is None):
            what = "names neither" if self.file is None else "names both"
            raise PydanticCustomError(
                "weights", "needs either a file or a seed and {what}; write file: x.safetensors or random: 0", {"what": what}
            )
        if self.random is not None and self.prefix:
            raise PydanticCustomError(
                "weights", "random weights have no prefix, got '{got}'; remove prefix, or name a file", {"got": self.prefix}
            )
        return self


class Compress(_Strict):
    """One entry of the compression plan; every other key is an option of the method and is checked by the method."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[JsonValue, AfterValidator(_check_option)]]

    at: Text = Field(description="the site, such as projector or decoder.2")
    method: MethodName = Field(description="the name of a method, see: tmc-export methods")
    scope: Literal["image", "joint"] = Field(default="image", description="whether a budget is per picture or for all together")
    weights: WeightsSource | None = Field(default=None, description="where a learned method's weights come from")

    @property
    def options(self) -> Mapping[str, JsonValue]:
        """The method's options as written: text, numbers, truth values, null, or lists of them."""
        return MappingProxyType(self.__pydantic_extra__)


def _check_capability(value: str) -> str:
    major, dot, minor = value.partition(".")
    if not (dot and major.isdigit() and len(minor) == 1 and minor.isdigit()):
        raise PydanticCustomError("capability", "must be text such as '8.9', got '{got}'", {"got": value})
    return value


class Target(_Strict):
    """Where the bundle runs.

    Attributes:
        device: a shipped device or a device file relative to the recipe.
        runtime: what executes the graphs there.
        decode_width: tokens the decode profile of an engine takes at once. A width of 1 stores float16 weights and w8a8 codes twice (its
            kernels want another layout), 2 stores every scheme's weights once (`benchmarks/decode_width.py`).
        memory_tight: onnxruntime keeps one copy of the weights: floating point in the mapped file, codes in the sessions of one phase.
        build_memory_gib: memory of the machine that builds the engines, GiB: blocks are cut until each engine can be built there. When
            absent, a Jetson's own, and for TensorRT-RTX that of the machine on which `build` or `plan` runs.
        compute_capabilities: what a TensorRT-RTX engine is built for, such as `"8.9"`; the device's own when absent.
    """

    device: Text = Field(default="cpu", description="a shipped device, see: tmc-export devices; or a device file")
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"] = Field(default="onnxruntime", description="what executes the graphs")
    decode_width: Count = Field(default=2, description="tokens the decode profile of an engine takes at once")
    memory_tight: bool = Field(default=False, description="spend speed to keep one copy of the weights")
    build_memory_gib: float | None = Field(default=None, gt=0, description="memory of the machine that builds the engines, GiB")
    compute_capabilities: tuple[Annotated[str, AfterValidator(_check_capability)], ...] | None = Field(
        default=None, description="compute capabilities of a TensorRT-RTX engine, such as '8.9'"
    )


class Recipe(_Strict):
    """A recipe as it was written, defaults filled in; made by `load_recipe`."""

    recipe: Literal[1] = Field(description="the schema version")
    name: Slug = Field(description="the recipe's name")
    model: ModelSource = Field(description="the checkpoint")
    inputs: Inputs = Field(description="the input budget")
    compress: tuple[Compress, ...] = Field(default=(), description="the compression plan, in order")
    quantize: Quantize = Field(default_factory=Quantize, description="how weights are stored")
    target: Target = Field(default_factory=Target, description="where the bundle runs")

    _origins: Origins = PrivateAttr(default_factory=lambda: Origins(Origin("<recipe>")))
    _path: FilePath | None = PrivateAttr(default=None)

    def origin(self, path: Path = ()) -> Origin:
        """Return where the value at `path` was written, e.g. `("compress", 0, "keep")`; a default has its holder's place."""
        return self._origins.at(path)

    @property
    def path(self) -> FilePath | None:
        """The recipe file, links resolved; None for a recipe that was made in Python."""
        return self._path

    @property
    def folder(self) -> FilePath:
        """What relative paths of the recipe start from: the folder of its file, or the working directory."""
        return FilePath.cwd() if self._path is None else self._path.parent

    def model_folder(self) -> FilePath | None:
        """Return the folder `model.source` names (it need not exist), or None when it is a hub id."""
        return self.source_folder(self.model.source)

    def source_folder(self, source: str) -> FilePath | None:
        """Return the folder that a source names (it need not exist), or None when it is a hub id.

        A source is a folder when it starts with `.`, `/` or `~`, or when such a folder lies beside the recipe.
        """
        folder = (self.folder / FilePath(source).expanduser()).resolve()
        return folder if source.startswith((".", "/", "~")) or folder.is_dir() else None

    def moved_to(self, folder: FilePath) -> Recipe:
        """Return the same recipe with relative paths starting from `folder`."""
        moved = self.model_copy()
        moved._path = folder.resolve() / "recipe.yaml"
        return moved

    def without_entry(self, index: int) -> Recipe:
        """Return the same recipe without one entry of `compress`; the others keep their lines."""
        changed = self.model_copy(update={"compress": (*self.compress[:index], *self.compress[index + 1 :])})
        changed._origins = self._origins.without(("compress", index))
        return changed

    def with_entry(self, index: int, at: str, options: Mapping[str, JsonValue]) -> Recipe:
        """Return the same recipe with an entry of `compress` at another site and with some options changed."""
        entry = self.compress[index]
        written = {**entry.model_dump(mode="json", exclude_defaults=True), "at": at, **options}
        changed = Compress.model_validate_json(json.dumps(written))
        return self.model_copy(update={"compress": (*self.compress[:index], changed, *self.compress[index + 1 :])})

    def with_build_memory(self, size_gib: float) -> Recipe:
        """Return the same recipe with `target.build_memory_gib` named."""
        return self.model_copy(update={"target": self.target.model_copy(update={"build_memory_gib": size_gib})})

    def with_keep(self, keep: Mapping[str, Sequence[str]]) -> Recipe:
        """Return the same recipe with other words in the `keep` of some parts of `quantize`."""
        parts = {part: getattr(self.quantize, part).model_copy(update={"keep": tuple(words)}) for part, words in keep.items()}
        return self.model_copy(update={"quantize": self.quantize.model_copy(update=parts)})

    def weights_file(self, entry: int) -> FilePath | None:
        """Return the file that `compress.<entry>.weights` names (it need not exist), found as a model folder is; None without one."""
        weights = self.compress[entry].weights
        if weights is None or weights.file is None:
            return None
        return (self.folder / FilePath(weights.file).expanduser()).resolve()

    def canonical_json(self) -> str:
        """Return the recipe with its defaults as one line of JSON with sorted keys: equal recipes, equal text. For hashing."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
