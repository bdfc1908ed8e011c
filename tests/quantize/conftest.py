"""A small model whose compress graph reads weights, and its bundles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

RECIPE = """\
recipe: 1
name: small
model: {{source: ./model, dtype: {dtype}}}
inputs: {{images: 1, text_tokens: 48, new_tokens: 8, chunk: 8}}
compress:
  - {{at: decoder.1, method: pyramiddrop, layers: [1], keep: [50%]}}
quantize: {{{quantize}}}
target: {target}
"""
"""pyramiddrop's scores are those of the layer after the cut, so that the compress graph reads weights of that layer."""

Build = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def equal_graphs_traced_once(traced_once: None) -> None:
    """One model in many schemes: its graphs are traced once."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.families._small import save_small_llava

    return save_small_llava(tmp_path_factory.mktemp("quantize") / "model", "qwen2", layers=2, vision_layers=2, hidden=64, image_size=42)


@pytest.fixture(scope="session")
def build(model: Path, sharing_traces: Callable[[], AbstractContextManager[None]]) -> Build:
    """`build(name, quantize="decoder: {weights: int4, block: 32}", dtype="float32", target=…)` → the bundle's folder, without engines."""
    from tmc_export.api.bundling import build_bundle

    def make(name: str, quantize: str = "", dtype: str = "float32", target: str = "{device: cpu, runtime: onnxruntime}") -> Path:
        recipe = model.parent / f"{name}.yaml"
        recipe.write_text(RECIPE.format(quantize=quantize, dtype=dtype, target=target), "utf-8")
        with sharing_traces():
            return build_bundle(recipe, model.parent / name, record=False, engines=False).folder

    return make


@pytest.fixture(scope="session")
def calibration(model: Path) -> str:
    """`calibration: …` of a recipe beside the model, and its data."""
    import numpy as np
    from PIL import Image

    folder = model.parent / "pictures"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (42, 42, 3), np.uint8)).save(folder / "a.png")
    (model.parent / "prompts.jsonl").write_text('{"prompt": "what is it"}\n{"prompt": "the one on the left"}\n', "utf-8")
    return "calibration: {images: pictures, prompts: prompts.jsonl}"


@pytest.fixture(scope="session")
def int4(build: Build) -> Path:
    return build("int4", "decoder: {weights: int4, block: 32, keep: [layers.1.mlp.down_proj]}")


@pytest.fixture(scope="session")
def plain(build: Build) -> Path:
    return build("plain")
