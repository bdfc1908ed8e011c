"""What a device file may say: the models of schema `device: 1`. A figure carries its source, or says that it is unverified."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from tmc_export.recipe._problems import check_version, validate
from tmc_export.recipe._shipped import find_shipped, shipped
from tmc_export.recipe._yaml import read_yaml
from tmc_export.recipe.recipe import Slug, _check_capability

__all__ = ["Device", "Figure", "Rates", "Sources", "TensorRT", "device_schema", "devices", "find_device", "load_device"]

VERSION = 1
"""The schema version this code reads."""

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int4", "fp4"]
Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Figure(_Strict):
    """A number and where it comes from.

    Attributes:
        value: the number, in the unit its field names; None when it is not known.
        source: the document it was read in (or the reckoning that gave it).
        unverified: it was not read in a document of the maker; an estimate that uses it says so.
    """

    value: float | None = Field(gt=0, description="the number, or null when unknown")
    source: Text | None = Field(default=None, description="the document it was read in")
    unverified: bool = Field(default=False, description="it was not read in the maker's own document")

    @model_validator(mode="after")
    def _has_a_source(self) -> Figure:
        if self.value is None and not self.unverified:
            raise PydanticCustomError("unverified", "a figure without a value must say unverified: true")
        if self.value is not None and self.source is None:
            raise PydanticCustomError("source", "a figure needs a source: the document it was read in")
        return self


class Rates(_Strict):
    """Peak dense rates (no structured sparsity) in tera-operations per second; a rate the device lacks is absent."""

    fp32: Figure | None = None
    fp16: Figure | None = None
    int8: Figure | None = None
    fp8: Figure | None = None
    fp4: Figure | None = None


class TensorRT(_Strict):
    """The engine builder of the device.

    Attributes:
        flavour: `tensorrt`, `tensorrt-rtx` or `none`.
        version: the version plans are made for; None without TensorRT.
        jetpack: the JetPack that brings that version; None off Jetson.
        releases: JetPack → TensorRT, as far as known.
        opset: the highest ONNX opset the emitted graphs may use there.
    """

    flavour: Literal["tensorrt", "tensorrt-rtx", "none"]
    version: Text | None = None
    jetpack: Text | None = None
    releases: dict[str, str] = Field(default_factory=dict)
    opset: int = Field(ge=17, le=26)

    @model_validator(mode="after")
    def _has_a_version(self) -> TensorRT:
        if (self.flavour == "none") != (self.version is None):
            raise PydanticCustomError("version", "a version goes with flavour tensorrt or tensorrt-rtx, and with none there is none")
        return self


class Sources(_Strict):
    """Where the facts come from that are no figures."""

    compute_capability: Text
    tensorrt: Text
    precisions: Text


class Device(_Strict):
    """A device as its file describes it; made by `load_device`."""

    device: Literal[1] = Field(description="the schema version")
    name: Slug = Field(description="the file's name without .yaml")
    product: Text = Field(description="the product's full name")
    kind: Literal["jetson", "rtx", "cpu"]
    compute_capability: Annotated[str, AfterValidator(_check_capability)] | None = Field(description="such as '8.7'; null without CUDA")
    memory_gib: Figure = Field(description="memory the graphs may use, GiB, before what the system takes")
    memory_shared: bool = Field(description="whether CPU and GPU share the memory")
    memory_bandwidth_gb_s: Figure = Field(description="peak memory bandwidth, 10^9 bytes a second")
    tflops: Rates = Field(description="peak dense rates")
    tensorrt: TensorRT
    precisions: tuple[Precision, ...] = Field(description="the precisions graphs may use there")
    sources: Sources
    notes: tuple[Text, ...] = ()

    @property
    def sm(self) -> str | None:
        """The architecture as TensorRT writes it: `"SM87"`; None without CUDA."""
        return None if self.compute_capability is None else "SM" + self.compute_capability.replace(".", "")

    def rate(self, precision: str) -> Figure | None:
        """Return the dense rate at a precision in tera-operations per second; None when the device has none."""
        found = getattr(self.tflops, precision, None)
        return found if isinstance(found, Figure) else None

    def figures(self) -> dict[str, Figure]:
        """Return every figure of the device by its name, `tflops.fp16` and the like."""
        rates = {f"tflops.{name}": self.rate(name) for name in Rates.model_fields}
        named = {"memory_gib": self.memory_gib, "memory_bandwidth_gb_s": self.memory_bandwidth_gb_s}
        return named | {name: figure for name, figure in rates.items() if figure is not None}


def find_device(name_or_path: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """Return the file of a device: a path (relative to `folder`), or the shipped device of that name.

    Raises:
        RecipeError: no shipped device has that name; lists them and the nearest one.
    """
    return find_shipped("device", name_or_path, folder)


def load_device(name_or_path: str | os.PathLike[str], folder: Path | None = None) -> Device:
    """Read and check a device.

    Args:
        name_or_path: a shipped device such as `"jetson-agx-orin-64gb"`, or a device file.
        folder: what a relative path starts from; the working directory when absent.

    Raises:
        RecipeError: one line per problem, as for recipes.
    """
    data, origins = read_yaml(find_device(name_or_path, folder), "device")
    check_version("device", VERSION, data, origins)
    return validate(Device, data, origins)


def devices() -> list[Device]:
    """Return the shipped devices, sorted by name."""
    return [load_device(file) for _, file in sorted(shipped("device").items())]


def device_schema() -> dict[str, JsonValue]:
    """Return the JSON Schema of a device file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Device.model_json_schema()}
