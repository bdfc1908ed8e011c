"""The example's modules, importable as its scripts import each other."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def tiny_llava() -> Path:
    return EXAMPLES / "tiny-llava"


@pytest.fixture(scope="session")
def pictures() -> Path:
    return EXAMPLES / "pictures"


@pytest.fixture(scope="session")
def importable(tiny_llava: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tiny_llava)
        yield


@pytest.fixture(scope="session")
def scenes(importable: None) -> ModuleType:
    pytest.importorskip("sklearn")
    return importlib.import_module("scenes")
