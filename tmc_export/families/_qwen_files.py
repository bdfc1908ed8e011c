"""What Qwen2-VL and Qwen2.5-VL have in common in their JSON files, old flat layout and new nested one.

Source: `configuration_qwen2_vl.py` and `configuration_qwen2_5_vl.py` of transformers 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tmc_export.core.errors import ModelError
from tmc_export.core.facts import DecoderFacts
from tmc_export.core.image_rule import ImageRule
from tmc_export.families._contract import ModelFiles, TokenRules
from tmc_export.families._defaults import decoder_facts, filled

__all__ = [
    "IMAGE_TOKEN",
    "check_size",
    "default_size",
    "image_rule",
    "mrope_decoder_facts",
    "text_config",
    "token_rules",
    "vision_config",
]

IMAGE_TOKEN = 151655
"""Default of `image_token_id`."""

_SIDE = 448
"""Side of the default bucket in pixels: 256 visual tokens, between LLaVA-1.5's 576 and what a board's memory likes."""


def text_config(files: ModelFiles, kind: str) -> dict[str, Any]:
    """Return the decoder's configuration with defaults filled in.

    The hub's first checkpoints keep the decoder's keys at the top level; later ones have `text_config`, which then counts alone.

    Args:
        files: the model's files.
        kind: the decoder's `model_type`.
    """
    config = files.config
    nested = config.get("text_config")
    return filled({**(nested if isinstance(nested, Mapping) else config), "model_type": kind}, "decoder")


def vision_config(files: ModelFiles, kind: str) -> dict[str, Any]:
    """Return the encoder's configuration with defaults filled in; old checkpoints name another `model_type` there, or none.

    Raises:
        ModelError: patches that are not square.
    """
    vision = filled({**files.config.get("vision_config", {}), "model_type": kind}, "encoder")
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(vision[key], int):
            raise ModelError(f"vision_config.{key} is {vision[key]!r}; a whole number is served")
    return vision


def mrope_decoder_facts(files: ModelFiles, kind: str) -> DecoderFacts:
    """Read the decoder's numbers; three rotary axes."""
    text = text_config(files, kind)
    return decoder_facts(text, tied=bool(files.config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)), rope_axes=3)


def check_size(vision: Mapping[str, Any], size: tuple[int, int], grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return the patch grid of a bucket.

    Args:
        vision: the encoder's filled configuration.
        size: height and width in pixels.
        grid: patch rows and columns, if an `input` stage changed them.

    Raises:
        ModelError: not a whole number of merged patches.
    """
    patch, merge = int(vision["patch_size"]), int(vision["spatial_merge_size"])
    step = patch * merge
    if size[0] < step or size[1] < step or size[0] % step or size[1] % step:
        near = [max(step, round(side / step) * step) for side in size]
        raise ModelError(
            f"image_size {list(size)} does not suit this model, which merges {merge}x{merge} patches of {patch} pixels; "
            f"height and width must be multiples of {step}, the nearest are {near}"
        )
    if grid is not None and (grid[0] < merge or grid[1] < merge or grid[0] % merge or grid[1] % merge):
        raise ModelError(f"a patch grid of {grid[0]}x{grid[1]} cannot be merged {merge}x{merge}; make both sides multiples of {merge}")
    return grid or (size[0] // patch, size[1] // patch)


def _image_processor(files: ModelFiles) -> Mapping[str, Any]:
    """The image processor's section, wherever this checkpoint keeps it."""
    nested = files.processor.get("image_processor")
    return nested if isinstance(nested, Mapping) else files.preprocessor or files.processor


def default_size(files: ModelFiles, vision: Mapping[str, Any]) -> tuple[int, int]:
    """A square of 448 pixels, brought within the processor's smallest and largest area."""
    step = int(vision["patch_size"]) * int(vision["spatial_merge_size"])
    section = _image_processor(files)
    size = section.get("size")
    area = size if isinstance(size, Mapping) else {}
    smallest, largest = section.get("min_pixels") or area.get("shortest_edge"), section.get("max_pixels") or area.get("longest_edge")
    side = _SIDE // step * step
    if isinstance(smallest, int):
        side = max(side, math.ceil(math.sqrt(smallest) / step) * step)
    if isinstance(largest, int):
        side = min(side, math.isqrt(largest) // step * step)
    side = max(side, step)
    return side, side


def image_rule(files: ModelFiles, vision: Mapping[str, Any], size: tuple[int, int], fit: str | None) -> ImageRule:
    """The checkpoint's processor for one bucket: stretched by default, out come patches.

    Raises:
        ModelError: processor and encoder cut pictures differently.
    """
    rule = ImageRule.from_processor(_image_processor(files), height=size[0], width=size[1], fit=fit)
    wanted = (int(vision["patch_size"]), int(vision["temporal_patch_size"]), int(vision["spatial_merge_size"]))
    if (rule.patch, rule.temporal_patch, rule.merge) != wanted:
        raise ModelError(
            f"the image processor makes patches of (side, frames, merge) = {(rule.patch, rule.temporal_patch, rule.merge)}, "
            f"the encoder takes {wanted}; preprocessor_config.json and config.json do not belong together"
        )
    return rule


def token_rules(files: ModelFiles, kind: str) -> TokenRules:
    """The image token, every id that ends an answer, and what a prompt writes for one picture."""
    ends = files.generation.get("eos_token_id")
    if ends is None:
        ends = text_config(files, kind).get("eos_token_id", 151645)
    return TokenRules(
        image=int(files.config.get("image_token_id", IMAGE_TOKEN)),
        eos=tuple(int(i) for i in ends) if isinstance(ends, list) else (int(ends),),
        image_text="<|vision_start|><|image_pad|><|vision_end|>",
    )
