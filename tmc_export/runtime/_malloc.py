"""Has the process give large blocks of memory back to the system when they are freed."""

from __future__ import annotations

import ctypes

__all__ = ["LARGE", "give_back_large_blocks"]

_M_MMAP_THRESHOLD = -3
"""glibc's number of the parameter, `malloc.h`."""
LARGE = 1 << 18
"""Bytes. At a MiB, the tensors between a prefill's products left a heap full of holes: 50 MiB at 0.36 billion weights."""


def give_back_large_blocks() -> bool:
    """Have blocks of `LARGE` bytes and more mapped one by one, for the whole process, from now on; say whether the C library can.

    Left alone, glibc raises the bound up to 32 MiB when such a block is freed, and keeps blocks below it in a heap that is full of holes.
    Other C libraries (musl, macOS, Windows) have no such parameter; nothing was measured there.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE))
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of that name
        return False
