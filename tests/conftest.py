"""What every test shares: the repository's path, and no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a hub client: the suite never depends on a network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TMC_EXPORT_CACHE_GIB"] = (
    "0"  # no test takes an engine that something else has built; the tests of the cache name one of their own
)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return REPOSITORY


@pytest.fixture(scope="session")
def sharing_traces(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    """A context in which subgraphs that are equal are traced once in a process (`tests/_traced.py`); `make test-all` traces every one."""
    if request.config.getoption("markexpr") != "not slow":
        return nullcontext
    from tests._traced import traced_once

    return traced_once


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, sharing_traces: Callable[[], AbstractContextManager[None]]) -> Path:
    """The smallest complete bundle, for all that look at one: `model`, `recipe.yaml` and `bundle`, which nobody changes."""
    pytest.importorskip("torch")
    from tests._tiny import save_tiny_model, tmc, write_recipe

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model")
    with sharing_traces():
        ran = tmc("build", write_recipe(folder), "-o", folder / "bundle", "-q")
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture(scope="module")
def traced_once(sharing_traces: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """The same for what a file's tests build; what the whole session shares enters the context itself."""
    with sharing_traces():
        yield
