"""Has the process give large blocks of memory back to the system when they are freed: always, or of what loads a session."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

__all__ = ["LARGE", "give_back_large_blocks", "large_blocks_apart"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the parameters, `malloc.h`."""
_HIGHEST = 32 << 20
"""Bytes up to which glibc raises the bound by itself (`DEFAULT_MMAP_THRESHOLD_MAX` of 64 bits); it trims its heap at twice as many."""
LARGE = 1 << 18
"""Bytes. At a MiB, the tensors between a prefill's products left a heap full of holes: 50 MiB at 0.36 billion weights."""


class _State:
    """Who has asked: somebody for good, and how many for a while."""

    always, inside = False, 0


_STATE, _LOCK = _State(), threading.Lock()


def give_back_large_blocks() -> bool:
    """Have blocks of `LARGE` bytes and more mapped one by one, for the whole process, from now on; say whether the C library can.

    Left alone, glibc raises the bound up to 32 MiB when such a block is freed, and keeps blocks below it in a heap that is full of holes.
    Other C libraries (musl, macOS, Windows) have no such parameter; nothing was measured there.
    """
    with _LOCK:
        _STATE.always = True
        return _set(_M_MMAP_THRESHOLD, LARGE)


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Have blocks of `LARGE` bytes and more that are taken inside mapped one by one.

    onnxruntime turns and packs weights while it loads them. From a heap, what is packed lands in the holes that what was turned left, and
    the process is larger by those that stay. Behind it blocks of up to 32 MiB come from the heap, for the whole process and from now on,
    which is as far as glibc goes by itself: mapped anew in every run, those of a prompt would be slower. After `give_back_large_blocks`
    nothing changes, and neither does it where the environment says what glibc is to do.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        yield
        return
    with _LOCK:
        _STATE.inside += 1
        asked = _STATE.always or _set(_M_MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        with _LOCK:
            _STATE.inside -= 1
            if asked and not _STATE.inside and not _STATE.always:
                _set(_M_MMAP_THRESHOLD, _HIGHEST)
                _set(_M_TRIM_THRESHOLD, 2 * _HIGHEST)


def _set(parameter: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of that name
        return False
