"""What every test shares: the repository's path, and no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
def traced_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Bundles whose subgraphs are traced once in a process (`tests/_traced.py`); `make test-all` traces every one."""
    if request.config.getoption("markexpr") != "not slow":
        yield
        return
    from tests._traced import traced_once

    with traced_once():
        yield
