"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["exchange", "write_whole"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""From <fcntl.h> and <linux/fs.h>."""


def write_whole(path: Path, data: str | bytes, mode: int | None = None) -> None:
    """Write a file beside its place and rename it there; when that fails, what was there before stays and nothing is left behind.

    Args:
        path: the file.
        data: what it shall hold; text is written as UTF-8.
        mode: its permissions; the system's default when None.

    Raises:
        OSError: it cannot be written; names the file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        if mode is not None:
            partial.chmod(mode)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, so that there is no moment without either; False where the system cannot."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
