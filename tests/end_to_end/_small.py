"""Models of reduced width and depth: every decoder, both towers, both Qwen generations with two photograph sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.end_to_end._proof import Built
from tests.families._small import save_small_llava, save_small_qwen2_5_vl, save_small_qwen2_vl
from tmc_export.plan.source import read_model_files
from tmc_export.verify.record import Script, made_up_scripts

__all__ = ["SMALL", "Small", "asked", "photographs", "scripts"]


@dataclass(frozen=True)
class Small:
    """A model, and the plans that it is proved with.

    Attributes:
        save: writes the model into a folder.
        compress: name → entries of the recipe.
        inputs: of the recipe.
    """

    save: Callable[[Path], Path]
    compress: dict[str, tuple[str, ...]]
    inputs: dict[str, Any] = field(default_factory=dict)


PLAIN: dict[str, tuple[str, ...]] = {"uncompressed": (), "fastv": ("{at: decoder.2, method: fastv, keep: 50%}",)}
RASTER = {
    **PLAIN,
    "random": ("{at: projector, method: random, keep: 50%}",),
    "pool": ("{at: projector, method: pool, kernel: 2, mode: average}",),
}
INPUTS: dict[str, Any] = {"images": 2, "text_tokens": 64, "new_tokens": 72, "chunk": 32}
TWO_SIZES = {**INPUTS, "image_size": [[112, 168], [168, 112]]}

SMALL = {
    "llava-llama": Small(lambda f: save_small_llava(f, "llama", "clip"), PLAIN, INPUTS),
    "llava-qwen2-siglip": Small(lambda f: save_small_llava(f, "qwen2", "siglip"), PLAIN, INPUTS),
    "llava-qwen3-siglip": Small(lambda f: save_small_llava(f, "qwen3", "siglip"), PLAIN, INPUTS),
    "llava-mistral-window": Small(lambda f: save_small_llava(f, "mistral", "clip", window=48), PLAIN, INPUTS),
    "qwen2-vl": Small(save_small_qwen2_vl, RASTER, TWO_SIZES),
    "qwen2.5-vl": Small(save_small_qwen2_5_vl, RASTER, TWO_SIZES),
}


def photographs() -> list[NDArray[np.uint8]]:
    """Photographs `[h, w, 3]`, wide and tall ones in turn."""
    from skimage import data

    wide, other = data.chelsea(), data.coffee()
    tall = data.astronaut()[:, 100:400]
    return [wide, tall, other, tall[::-1].copy(), other[:, ::-1].copy(), tall[:, ::-1].copy(), wide[:, ::-1].copy(), tall]


def asked(built: Built) -> list[tuple[NDArray[np.uint8], str]]:
    """Three photographs in the size of a bucket, so that nobody resizes them, with a question each."""
    from PIL import Image

    sizes = [built.plan.vision[i % len(built.plan.vision)].size for i in range(3)]
    shown = [Image.fromarray(p).resize((w, h)) for p, (h, w) in zip(photographs(), sizes, strict=False)]
    return [(np.asarray(p), "what is in the picture") for p in shown]


def scripts(built: Built) -> list[Script]:
    """No picture, one, a short and a full prompt, two pictures at once, and a conversation of three turns."""
    return made_up_scripts(built.model, built.plan, read_model_files(built.model), pictures=photographs())
