"""tmc-export: compile multimodal LLMs, with visual-token compression, into verified bundles that run without PyTorch.

Importing this package imports nothing else: `build` and `load` are fetched from `tmc_export.api` when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmc_export.api import build as build
    from tmc_export.api import load as load

__all__ = ["__version__", "build", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Fetch `build` and `load` at their first use; raises `AttributeError` for any other name."""
    if name in ("build", "load"):
        return getattr(import_module("tmc_export.api"), name)
    raise AttributeError(f"module 'tmc_export' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
