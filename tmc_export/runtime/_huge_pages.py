"""Huge pages for what onnxruntime packs: fewer misses when every token reads all of it.

A session's packed weights lie on its heap in pages of 4 KiB, and a decode step walks through them once. Linux can put them together into
pages of 2 MiB (`madvise(2)`: `MADV_HUGEPAGE`, and `MADV_COLLAPSE` of Linux 6.1, which does it at once). No value changes.
`benchmarks/huge_pages.py` has the figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

__all__ = ["HUGE_PAGE", "huge_pages", "mappings", "new_spans"]

HUGE_PAGE = 2 << 20
"""Bytes of a huge page of x86-64, and of arm64 with pages of 4 KiB."""

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h
_MAPS = Path("/proc/self/maps")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Span = tuple[int, int]


def mappings(maps: str) -> list[Span]:
    """Return first address and end of every writable private memory that no file backs, in the order of `maps`.

    Args:
        maps: the text of `/proc/<pid>/maps`, proc(5).
    """
    found = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        name = fields[5] if len(fields) > 5 else ""
        if fields[1] == "rw-p" and name in ("", "[heap]"):
            low, _, high = fields[0].partition("-")
            found.append((int(low, 16), int(high, 16)))
    return found


def new_spans(before: Iterable[Span], after: Iterable[Span], page: int = HUGE_PAGE) -> list[Span]:
    """Return the whole pages that are in `after` and not in `before`; both in rising order, none overlapping in itself."""
    found = []
    old = sorted(before)
    for low, high in sorted(after):
        for taken, until in [*((a, b) for a, b in old if a < high and b > low), (high, high)]:
            first, last = -(-low // page) * page, min(taken, high) // page * page
            if last > first:
                found.append((first, last))
            low = max(low, until)
    return found


@contextlib.contextmanager
def huge_pages(wanted: bool) -> Iterator[None]:
    """Put the memory that is taken inside the block into huge pages; nothing happens where the system has none, or has them always."""
    madvise = _madvise() if wanted else None
    if madvise is None:
        yield
        return
    before = mappings(_MAPS.read_text("utf-8", "replace"))
    yield
    for low, high in new_spans(before, mappings(_MAPS.read_text("utf-8", "replace"))):
        madvise(low, high - low, _MADV_HUGEPAGE)  # an older kernel does no more; its khugepaged follows within minutes
        madvise(low, high - low, _MADV_COLLAPSE)  # refused for a thread's untouched stack, and where memory is in pieces: both do no harm


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        asked = "[madvise]" in _ENABLED.read_text("ascii")
    except OSError:  # another system, or a kernel without them
        return None
    if not asked:
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function
