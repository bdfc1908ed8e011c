"""Where this machine keeps what it can make again, and how much of it."""

from __future__ import annotations

import os
from pathlib import Path

from tmc_export.core.errors import RuntimeInputError

__all__ = ["CACHE", "CACHE_GIB", "cache_bytes", "cache_folder"]

CACHE, CACHE_GIB = "TMC_EXPORT_CACHE_DIR", "TMC_EXPORT_CACHE_GIB"
_DEFAULT_GIB = 16.0


def cache_folder() -> Path:
    """Return the cache's folder, which need not exist: `$TMC_EXPORT_CACHE_DIR`, else `tmc-export` in the user's cache folder."""
    if named := os.environ.get(CACHE):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "tmc-export"


def cache_bytes() -> int:
    """Return the bytes that the cache may take: `$TMC_EXPORT_CACHE_GIB` GiB, 16 by default; 0 means no cache.

    Raises:
        RuntimeInputError: the variable holds no such number.
    """
    text = os.environ.get(CACHE_GIB) or str(_DEFAULT_GIB)
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < 1 << 20:
        raise RuntimeInputError(f"{CACHE_GIB}={text} is no number of GiB; give 0 for no cache, or for example 16")
    return int(size * 2**30)
