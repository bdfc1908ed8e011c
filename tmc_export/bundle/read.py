"""Reading a bundle: the manifest, and files whose hashes are checked before they are used."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from tmc_export.bundle.manifest import MANIFEST, SCHEMA, Manifest
from tmc_export.bundle.write import hash_file
from tmc_export.core.errors import BundleError

__all__ = ["check_files", "open_manifest", "path_in"]


def open_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        BundleError: there is none, it is damaged, or a newer version wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with: tmc-export build RECIPE -o {folder}")
    try:
        manifest = Manifest.model_validate_json(path.read_text("utf-8"))
    except (ValidationError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise BundleError(f"{path} cannot be read: {first}; it is damaged or of another version: build the bundle again") from error
    if manifest.bundle > SCHEMA:
        raise BundleError(f"{path} has schema {manifest.bundle}, this tmc-export reads up to {SCHEMA}; upgrade tmc-export")
    return manifest


def path_in(folder: Path, name: str) -> Path:
    """Return the path of a bundle's file; a name that leaves the folder is refused.

    Raises:
        BundleError: the name is absolute or climbs out.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise BundleError(f"the manifest of {folder} names '{name}', which leaves the bundle; do not use this bundle")
    return folder.joinpath(*pure.parts)


def check_files(folder: Path, manifest: Manifest, names: list[str] | None = None, *, sizes_only: bool = False) -> None:
    """Check files against the manifest.

    Args:
        folder: the bundle.
        manifest: its manifest.
        names: which files; all of them when None.
        sizes_only: compare sizes, not hashes; what every start can afford for large weights.

    Raises:
        BundleError: a file is missing or differs; the first one is named.
    """
    for name in sorted(manifest.files) if names is None else names:
        entry = manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{folder}: '{name}' is not in the manifest; build the bundle again")
        path = path_in(folder, name)
        if not path.is_file():
            raise BundleError(f"{folder}: the file '{name}' is missing; copy the whole folder again")
        size = path.stat().st_size
        if size != entry.size:
            raise BundleError(f"{folder}: '{name}' has {size} bytes, the manifest says {entry.size}; copy the bundle again")
        if not sizes_only and hash_file(path) != entry.sha256:
            raise BundleError(f"{folder}: '{name}' differs from what was built (sha256); copy or build the bundle again")
