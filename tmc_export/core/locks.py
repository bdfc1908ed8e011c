"""Locks that the system takes back when their holder ends, however it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

__all__ = ["held", "hold", "is_at", "try_lock"]

_POSIX = find_spec("fcntl") is not None


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder unless somebody else holds it.

    Returns:
        True: it is ours until the descriptor is closed. False: somebody holds it. None: there are no locks here (the file system, or not
        a POSIX system), so that nobody can say.
    """
    if not _POSIX:
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def hold(descriptor: int, waiting: Callable[[], None]) -> bool:
    """Lock an open file or folder; wait while somebody else holds it.

    Args:
        descriptor: of the file or folder; the lock lasts until it is closed.
        waiting: called once, before the wait.

    Returns:
        False where there are no locks.
    """
    taken = try_lock(descriptor)
    if taken is not False:
        return taken is True
    import fcntl

    waiting()
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Say whether `path` still is what was opened: while one waits for a lock, its holder may rename or remove the thing."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


@contextmanager
def held(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file (made where it is missing) or of a folder while active; where there are no locks, hold nothing.

    Args:
        path: the file or folder.
        waiting: called when somebody else holds it, before the wait.
    """
    path = Path(os.path.realpath(path))
    while _POSIX:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
        try:
            hold(descriptor, waiting)
            if is_at(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)
    yield
