"""A bundle whose decode graphs hold onnxruntime's GroupQueryAttention, and its int4 twin; tests copy what they damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests._tiny import RECIPE, tmc, write_recipe
from tests.families._small import save_small_llava


@pytest.fixture(scope="module", autouse=True)
def equal_graphs_traced_once(traced_once: None) -> None:
    """One model in two schemes."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two decoder layers with heads of 16 channels."""
    pytest.importorskip("torch")
    return save_small_llava(tmp_path_factory.mktemp("debug") / "model", layers=2, vision_layers=2, hidden=64, image_size=42)


@pytest.fixture(scope="session")
def good(model: Path, sharing_traces: Callable[[], AbstractContextManager[None]]) -> Path:
    """The bundle that is right; not to be changed."""
    with sharing_traces():
        ran = tmc("build", write_recipe(model.parent), "-o", model.parent / "good", "-q")
    assert ran.code == 0, ran.err
    return model.parent / "good"


@pytest.fixture(scope="session")
def int4(model: Path, sharing_traces: Callable[[], AbstractContextManager[None]]) -> Path:
    """The same recipe with the decoder's linears in int4; nothing recorded."""
    (model.parent / "int4-recipe").mkdir()
    (model.parent / "int4-recipe" / "model").symlink_to(model)
    text = RECIPE.replace("quantize: {}", "quantize: {decoder: {weights: int4, block: 32}}")
    with sharing_traces():
        ran = tmc("build", write_recipe(model.parent / "int4-recipe", text), "-o", model.parent / "int4", "-q", "--no-record")
    assert ran.code == 0, ran.err
    return model.parent / "int4"


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    """A copy of the good bundle, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "bundle"))
