"""Reading a bundle: the manifest, and files whose hashes are checked before they are used."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from tmc_export.bundle.manifest import MANIFEST, SCHEMA, Manifest
from tmc_export.bundle.write import hash_file
from tmc_export.core.errors import BundleError, NotABundleError

__all__ = ["check_files", "open_manifest", "path_in"]


def open_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        NotABundleError: there is none.
        BundleError: it is damaged, or a newer version wrote it.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise NotABundleError(f"the bundle {folder} {what}; give the folder that tmc-export build wrote")
    if not path.is_file():
        raise NotABundleError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with: tmc-export build RECIPE -o {folder}")
    try:
        data = json.loads(path.read_text("utf-8"))
        version = data.get("bundle") if isinstance(data, dict) else None
        if isinstance(version, int) and version > SCHEMA:  # before its form is looked at, which only its own version knows
            raise BundleError(f"{path} has schema {version}, this tmc-export reads up to {SCHEMA}; upgrade tmc-export")
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise BundleError(f"{path} cannot be read: {what}; it is damaged or of another version: build the bundle again") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON ({error}); it is damaged: build the bundle again") from error


def path_in(folder: Path, name: str, what: str = "the manifest") -> Path:
    """Return the path of a bundle's file; a name that leaves the folder is refused.

    Args:
        folder: the bundle, or one in it.
        name: below the folder.
        what: names it, for the message.

    Raises:
        BundleError: the name is absolute or climbs out.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise BundleError(f"{what} of {folder} names '{name}', which leaves the bundle; do not use this bundle")
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
