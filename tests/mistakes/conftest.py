"""The smallest bundle for the whole folder; tests copy what they damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests._tiny import write_recipe


@pytest.fixture(scope="module", autouse=True)
def equal_graphs_traced_once(traced_once: None) -> None:
    """One model for the whole folder: its graphs are traced once."""


@pytest.fixture(scope="session")
def model(tiny: Path) -> Path:
    return tiny / "model"


@pytest.fixture(scope="session")
def built(tiny: Path) -> Path:
    """The bundle that all share; not to be changed."""
    return tiny / "bundle"


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the model, to be damaged, and a recipe that names it."""
    shutil.copytree(model, tmp_path / "model")
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 48, 3), np.uint8)).save(path)
    return path
