"""Imports at use: an optional package is imported where it is needed, and its absence names the extra that brings it."""

from __future__ import annotations

import importlib
from types import ModuleType

from tmc_export.core.errors import MissingExtraError

__all__ = ["require"]


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or say in one line which extra brings it.

    Args:
        module: dotted module name, e.g. `"torch"`.
        extra: the extra of tmc-export that installs it, e.g. `"export"`.
        purpose: what the caller wanted to do, e.g. `"build a bundle"`.

    Raises:
        MissingExtraError: the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"cannot {purpose}: the package '{module}' is missing ({error}); install it with: pip install 'tmc-export[{extra}]'"
        ) from error
