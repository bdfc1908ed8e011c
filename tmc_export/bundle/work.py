"""The folder that a bundle is built in: beside its place, held by a lock, and found again by the next build of the same bundle.

`out/x` is built in `out/.x.<key>.part`, which its builder holds a lock on; the first 16 digits of the build's key tell it from others. A
builder that is killed leaves it, and the next one of that key goes on in it. What builders of another key left is found by its free
lock and removed. Without a key the name is a random one, and nothing is left.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tmc_export.bundle.journal import FOR_THE_NEXT, JOURNAL
from tmc_export.bundle.manifest import MANIFEST
from tmc_export.core.errors import NotABundleError
from tmc_export.core.files import exchange
from tmc_export.core.locks import hold, is_at, try_lock

__all__ = ["WorkFolder", "check_replaceable", "remove_remains"]

_PART, _OLD = ".part", ".old"
_DIGITS = 16
_ATTEMPTS = 100
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_replaceable(target: Path, marker: str = MANIFEST) -> None:
    """Make sure that writing `target` loses nobody's files: it is absent, empty, or holds `marker`, as a bundle does its manifest.

    Raises:
        NotABundleError: it is something else.
    """
    if target.exists() and not (target / marker).is_file() and (not target.is_dir() or any(target.iterdir())):
        kind = "a bundle" if marker == MANIFEST else "a folder of the same command"
        what = f"is not {kind} (it has no {marker})" if target.is_dir() else "is a file"
        raise NotABundleError(f"{target} exists and {what}; choose another folder or remove it")


class WorkFolder:
    """A folder to build in. Left without `publish`, `target` is as before.

    After an error the folder is removed. When the builder is interrupted (Ctrl-C) or killed, one with a key stays for the next builder.

    Args:
        target: the folder that it becomes; a link stays one, and what it points to is replaced.
        marker: a file by which a folder that may be replaced is known.
        key: hash of what is built, in hexadecimal; None: whatever it is, nothing of it is taken up again.
        waiting: called when another builder of that key is at work, before the wait for its end.

    Attributes:
        path: the folder.
        waited: another builder was at work; it may have built the very thing.

    Raises:
        NotABundleError: `target` exists and lacks `marker`, so that replacing it would lose somebody's files.
    """

    def __init__(self, target: Path, marker: str = MANIFEST, key: str | None = None, waiting: Callable[[], None] = lambda: None) -> None:
        self._target, self._marker, self._key, self._tell = Path(os.path.realpath(target)), marker, key, waiting
        self.waited = self._published = self._exchanged = False
        self._locks: list[int] = []
        self.path = self._target

    def __enter__(self) -> WorkFolder:
        check_replaceable(self._target, self._marker)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        named = None if self._key is None else self._target.with_name(f".{self._target.name}.{self._key[:_DIGITS]}{_PART}")
        remove_remains(self._target, named)
        found = None if named is None else _take(named, self._waiting)
        self.path, lock = found or _make(self._target)
        self._locks.append(lock)
        self._resumable = found is not None
        self._old = self.path.with_suffix(_OLD)
        self.path.chmod(0o755)
        _bring_back(self._old, self._target)
        return self

    def _waiting(self) -> None:
        self.waited = True
        self._tell()

    def publish(self) -> None:
        """Put the folder in the place of the target: in one step, or, where the system cannot, in two renames."""
        if (there := _hold(self._target)) is not None:  # until what was there is removed, nobody takes it for a work folder
            self._locks.append(there)
            self._exchanged = exchange(self.path, self._target)
        if not self._exchanged:
            _replace(self.path, self._target, self._old)
        self._published = True
        _forget(self._target)  # not before: a builder that is killed here has a journal or a bundle

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stays = self._resumable and kind is not None and not issubclass(kind, Exception)
        if self._exchanged or not (self._published or stays):
            shutil.rmtree(self.path, ignore_errors=True)
        _bring_back(self._old, self._target)
        for lock in self._locks:
            os.close(lock)
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            error.filename = str(self._target)  # what could not be written is inside a folder that is gone now


def remove_remains(target: Path, but: Path | None = None) -> None:
    """Remove what killed builders of `target` left; a bundle that one had put aside comes back. Folders of living builders stay.

    Args:
        target: the folder that they built; a link to it will do.
        but: a folder that is taken up again.
    """
    target = Path(os.path.realpath(target))
    for part in _siblings(target, _PART):
        if part == but:
            continue
        try:
            lock = os.open(part, _FOLDER)
        except OSError:
            continue  # gone meanwhile
        try:
            if try_lock(lock):
                _bring_back(part.with_suffix(_OLD), target)
                shutil.rmtree(part, ignore_errors=True)
        finally:
            os.close(lock)
    for old in _siblings(target, _OLD):
        if not old.with_suffix(_PART).exists() and target.exists():
            shutil.rmtree(old, ignore_errors=True)
    if (target / JOURNAL).is_file():  # a builder was killed when all was done but this
        _forget(target)


def _forget(bundle: Path) -> None:
    """Remove what was for the next builder; the journal last, which tells that there is something to remove."""
    shutil.rmtree(bundle / FOR_THE_NEXT, ignore_errors=True)
    (bundle / JOURNAL).unlink(missing_ok=True)


def _bring_back(old: Path, target: Path) -> None:
    """Undo the first of the two renames of a builder that ended between them; otherwise remove what was put aside."""
    if old.is_dir() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _take(work: Path, waiting: Callable[[], None]) -> tuple[Path, int] | None:
    """Make or find a folder and lock it, when need be after its builder has ended; None where there are no locks."""
    while True:
        made = not work.exists()
        work.mkdir(exist_ok=True)
        try:
            lock = os.open(work, _FOLDER)
        except FileNotFoundError:  # renamed or taken away before it was opened
            continue
        try:
            locked = hold(lock, waiting)
        except BaseException:
            os.close(lock)
            raise
        if locked and is_at(lock, work):
            return work, lock
        os.close(lock)
        if not locked:
            if made:
                work.rmdir()
            return None


def _make(target: Path) -> tuple[Path, int]:
    """Make a folder that this process holds the lock of; another builder's cleaning may take it away before it is locked."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PART, dir=target.parent))
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # taken away before it was opened
            continue
        if try_lock(lock) is not False and work.is_dir():
            return work, lock
        os.close(lock)


def _hold(target: Path) -> int | None:
    """Lock the folder that lies at `target`; None when there is none."""
    while True:
        try:
            lock = os.open(target, _FOLDER)
        except FileNotFoundError:
            return None
        hold(lock, lambda: None)  # for a moment: who holds it has just put it there
        if is_at(lock, target):
            return lock
        os.close(lock)


def _siblings(target: Path, suffix: str) -> list[Path]:
    """Return the temporary folders of `target` itself: those of `x.y` are not those of `x`."""
    mine = re.compile(rf"\.{re.escape(target.name)}\.([a-z0-9_]{{8}}|[0-9a-f]{{{_DIGITS}}}){re.escape(suffix)}")
    return [path for path in target.parent.iterdir() if mine.fullmatch(path.name)]


def _replace(work: Path, target: Path, old: Path) -> None:
    """Put `work` in the place of `target`; other builders may do the same at the same time."""
    for attempt in range(_ATTEMPTS):
        try:
            target.rename(old)
        except FileNotFoundError:
            pass  # there was none, or another builder has just put it aside
        try:
            work.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == _ATTEMPTS - 1:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)  # another builder's bundle came between: put that one aside as well
        else:
            return
