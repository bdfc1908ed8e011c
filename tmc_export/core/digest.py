"""The sha256 of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["hash_file"]


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
