"""Writing a bundle: into a temporary sibling, then renamed, so that a half-written one is never seen.

`out/x` is written as `out/.x.<random>.part`, which its builder holds a lock on. What a killed builder left is found by its free lock and
removed by the next build of the same folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmc_export.bundle.manifest import MANIFEST, FileEntry, Manifest
from tmc_export.core.errors import NotABundleError

__all__ = ["atomic_folder", "check_replaceable", "hash_file", "seal", "write_manifest"]

_PART, _OLD = ".part", ".old"
_ATTEMPTS = 100


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_replaceable(target: Path, marker: str = MANIFEST) -> None:
    """Make sure that writing `target` loses nobody's files: it is absent, empty, or holds `marker`, as a bundle does its manifest.

    Raises:
        NotABundleError: it is something else.
    """
    if target.exists() and not (target / marker).is_file() and (not target.is_dir() or any(target.iterdir())):
        kind = "a bundle" if marker == MANIFEST else "a folder of the same command"
        what = f"is not {kind} (it has no {marker})" if target.is_dir() else "is a file"
        raise NotABundleError(f"{target} exists and {what}; choose another folder or remove it")


@contextmanager
def atomic_folder(target: Path, marker: str = MANIFEST) -> Iterator[Path]:
    """Give a temporary folder beside `target` and rename it there at the end; on any error it is removed and `target` is as before.

    Of several builders at once, each bundle is whole and the one that ends last stays.

    Args:
        target: the folder.
        marker: a file by which a folder that may be replaced is known.

    Raises:
        NotABundleError: `target` exists and lacks `marker`, so that replacing it would lose somebody's files.
    """
    target = Path(os.path.realpath(target))  # a link stays one, and what it points to is replaced
    check_replaceable(target, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    work, lock = _make(target)
    old = work.with_suffix(_OLD)
    try:
        work.chmod(0o755)
        yield work
        _replace(work, target, old)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def _make(target: Path) -> tuple[Path, int]:
    """Make a folder that this process holds the lock of; another builder's cleaning may take it away before it is locked."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PART, dir=target.parent))
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # taken away before it was opened
            continue
        if _lock(lock) and work.is_dir():
            return work, lock
        os.close(lock)


def _lock(folder: int) -> bool:
    """Lock an open folder unless another process holds it. Where a file system has no locks, every folder counts as held by its maker."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return True
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _clean(target: Path) -> None:
    """Remove what killed builders of `target` left; a bundle that one had put aside comes back."""
    for part in _siblings(target, _PART):
        old = part.with_suffix(_OLD)
        try:
            lock = os.open(part, os.O_RDONLY)
        except OSError:
            continue  # gone meanwhile
        try:
            if _free(lock):
                if old.is_dir() and not target.exists():
                    old.rename(target)
                shutil.rmtree(part, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            os.close(lock)
    for old in _siblings(target, _OLD):
        if not old.with_suffix(_PART).exists() and target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _free(folder: int) -> bool:
    """Say whether the maker of a folder is gone for certain: its lock can be taken."""
    try:
        import fcntl

        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _siblings(target: Path, suffix: str) -> list[Path]:
    """Return the temporary folders of `target` itself: those of `x.y` are not those of `x`."""
    mine = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}{re.escape(suffix)}")
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


def _rebuilt(name: str) -> bool:
    """Say whether a file is written anew when engines are built for another machine: engines, their layers, their record."""
    return name.startswith("engines/") and name.endswith((".engine", ".engine.layers.json", "/engines.json", "/timing.cache"))


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of `folder` but built engines, and write the manifest; returns it with `files` filled in."""
    files: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path != folder / MANIFEST and not _rebuilt(name):
            files[name] = FileEntry(size=path.stat().st_size, sha256=hash_file(path))
    return write_manifest(folder, manifest.model_copy(update={"files": files}))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest as it is, in one step; returns it."""
    part = folder / f"{MANIFEST}.part"
    part.write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
    os.replace(part, folder / MANIFEST)
    return manifest
