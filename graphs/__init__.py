"""The method library: one compression method of the literature per file.

`METHODS` finds every public module of this folder by itself: adding a method is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from tmc_export.core.registry import Registry
from tmc_export.graphs._contract import Method

__all__ = ["METHODS", "register"]


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"tmc_export.graphs.{module.name}")


METHODS: Registry[type[Method]] = Registry("method", _load)


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method class under `name`, the name recipes use; a second one of that name raises `ValueError`."""

    def add(method: type[Method]) -> type[Method]:
        method.name = name
        return METHODS.register(name)(method)

    return add
