"""Writing a bundle: into a folder beside its place, then renamed, so that a half-written one is never seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmc_export.bundle.journal import FOR_THE_NEXT, JOURNAL
from tmc_export.bundle.manifest import MANIFEST, FileEntry, Manifest
from tmc_export.bundle.work import WorkFolder, check_replaceable
from tmc_export.core.digest import hash_file
from tmc_export.core.files import write_whole

__all__ = ["atomic_folder", "check_replaceable", "hash_file", "rebuilt", "seal", "write_manifest"]


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
    with WorkFolder(target, marker) as work:
        yield work.path
        work.publish()


def rebuilt(name: str) -> bool:
    """Say whether a file is written anew when engines are built for another machine: engines, their layers, their record."""
    return name.startswith("engines/") and name.endswith((".engine", ".engine.layers.json", "/engines.json", "/timing.cache"))


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of `folder` but built engines, and write the manifest; returns it with `files` filled in."""
    files: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        own = name not in (MANIFEST, JOURNAL) and not name.startswith(f"{FOR_THE_NEXT}/")
        if path.is_file() and own and not rebuilt(name):
            files[name] = FileEntry(size=path.stat().st_size, sha256=hash_file(path))
    return write_manifest(folder, manifest.model_copy(update={"files": files}))


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest as it is, in one step; returns it."""
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return manifest
