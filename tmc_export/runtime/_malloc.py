"""Has the process give large blocks of memory back to the system when they are freed: always, or of what loads a session."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

__all__ = ["LARGE", "give_back_large_blocks", "large_blocks_apart"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the parameters, `malloc.h`."""
_HIGHEST = 32 << 20
"""Bytes up to which glibc raises the bound by itself (`DEFAULT_MMAP_THRESHOLD_MAX` of 64 bits); it trims its heap at twice as many."""
LARGE = 1 << 18
"""Bytes. At a MiB, the tensors between a prefill's products left a heap full of holes: 50 MiB at 0.36 billion weights."""


def give_back_large_blocks() -> bool:
    """Have blocks of `LARGE` bytes and more mapped one by one, for the whole process, from now on; say whether the C library can.

    Left alone, glibc raises the bound up to 32 MiB when such a block is freed, and keeps blocks below it in a heap that is full of holes.
    Other C libraries (musl, macOS, Windows) have no such parameter; nothing was measured there.
    """
    return _set(_M_MMAP_THRESHOLD, LARGE)


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Have blocks of `LARGE` bytes and more that are taken inside mapped one by one.

    onnxruntime turns and packs weights while it loads them. From a heap, what is packed lands in the holes that what was turned left: the
    process is larger by those that stay, and a token that reads all weights takes longer. Behind it large blocks come from the heap again,
    as they do in a process that has freed one: mapped anew in every run, those of a prompt would be slower (`benchmarks/README.md`).
    """
    asked = _set(_M_MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        if asked:
            _set(_M_MMAP_THRESHOLD, _HIGHEST)
            _set(_M_TRIM_THRESHOLD, 2 * _HIGHEST)


def _set(parameter: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of that name
        return False
