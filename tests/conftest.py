"""What every test shares: the repository's path, and no network."""

from __future__ import annotations

import os
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
