"""Writing a bundle: into a temporary sibling, then renamed, so that a half-written one is never seen."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmc_export.bundle.manifest import MANIFEST, FileEntry, Manifest
from tmc_export.core.errors import BundleError

__all__ = ["atomic_folder", "hash_file", "seal"]


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` and rename it there at the end; on any error it is removed and `target` is as before.

    Raises:
        BundleError: `target` exists and is no bundle, so that replacing it would lose somebody's files.
    """
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"{target} exists and is not a bundle (it has no {MANIFEST}); choose another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    old = work.with_suffix(".old")
    try:
        work.chmod(0o755)
        yield work
        if target.exists():
            target.rename(old)
        try:
            work.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of `folder` and write the manifest; returns it with `files` filled in."""
    files: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(folder).as_posix()] = FileEntry(size=path.stat().st_size, sha256=hash_file(path))
    sealed = manifest.model_copy(update={"files": files})
    part = folder / f"{MANIFEST}.part"
    part.write_text(sealed.model_dump_json(indent=1) + "\n", "utf-8")
    os.replace(part, folder / MANIFEST)
    return sealed
