"""What is finished of a bundle that is being built, so that the next builder goes on where a killed one stopped.

`.journal` in the build's folder has one record a line, each with a checksum of its own: a tensor that was appended to a weight file, or a
step with the files that it wrote and what it found out. A record is written after what it tells of. On opening, the journal is believed
up to the first record that does not hold: a line that is damaged, bytes that are not those that were written. What comes after it, and
every file that no record names, is removed, and a weight file ends where its last tensor does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmc_export.core.digest import hash_file

__all__ = ["FOR_THE_NEXT", "JOURNAL", "Journal", "Place"]

JOURNAL = ".journal"
FOR_THE_NEXT = ".journal.files"
"""A folder of files that steps keep for the next builder; like the journal, it is no part of the bundle."""
_SCHEMA = 1
_CHECK = 16
_BLOCK = 1 << 22

Place = tuple[str, int, int]
"""Where a tensor lies: path in the folder, offset and length in bytes."""


@dataclass
class _Record:
    """One line: its fields, and where it ends in the journal."""

    fields: dict[str, Any]
    end: int


@dataclass
class _Book:
    """What the records up to one of them say."""

    places: dict[str, Place] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def add(self, fields: dict[str, Any]) -> None:
        """Take one record in."""
        if "weight" in fields:
            file, offset, length = str(fields["file"]), int(fields["offset"]), int(fields["length"])
            self.places[str(fields["weight"])] = file, offset, length
            self.ends[file] = offset + length
        elif "step" in fields:
            self.steps[str(fields["step"])] = fields["value"]
            self.files |= {str(name): str(digest) for name, digest in fields["files"].items()}


class Journal:
    """The journal of a folder; opening it cleans the folder up.

    Args:
        folder: where the bundle is built; nobody else may write there.
        key: of the build; a journal of another one is not believed.
        rebuilt: says of a file whether something else answers for it, so that it is left alone.

    Attributes:
        problem: why not everything was believed that an earlier builder wrote; None when nothing was wrong.
    """

    def __init__(self, folder: Path, key: str, rebuilt: Callable[[str], bool] = lambda name: False) -> None:
        self.folder = folder
        self.problem: str | None = None
        self._path = folder / JOURNAL
        records = self._read(key)
        self._book = self._believed(records)
        self._clean(rebuilt)
        if self._path.is_file():
            os.truncate(self._path, records[-1].end if records else 0)
        if not records:
            self._append({"journal": _SCHEMA, "key": key})

    @property
    def places(self) -> Mapping[str, Place]:
        """Key of a tensor → where its bytes lie."""
        return self._book.places

    @property
    def resumed(self) -> str | None:
        """What there is to go on from, for people; None when there is nothing."""
        done, stored = len(self._book.steps), sum(self._book.ends.values())
        return f"{done} steps and {stored / 1e6:.1f} MB of weights are there already" if done or stored else None

    @property
    def steps(self) -> Mapping[str, Any]:
        """Finished step → what it found out."""
        return self._book.steps

    def wrote(self, key: str, place: Place, data: bytes) -> None:
        """Record a tensor that was appended to a weight file.

        Args:
            key: says what the bytes are.
            place: where they lie; bytes between the end of the file before and the offset are zero.
            data: the bytes.
        """
        file, offset, length = place
        digest = hashlib.sha256(bytes(offset - self._book.ends.get(file, 0)))
        digest.update(data)
        self._append({"weight": key, "file": file, "offset": offset, "length": length, "sha256": digest.hexdigest()})

    def finish(self, step: str, files: Iterable[str], value: Any) -> None:
        """Record a finished step.

        Args:
            step: its name.
            files: paths in the folder of the files that it wrote, or wrote anew; weight files are not among them.
            value: what it found out, as JSON.
        """
        self._append({"step": step, "files": {name: hash_file(self.folder / name) for name in files}, "value": value})

    def _append(self, fields: dict[str, Any]) -> None:
        text = json.dumps(fields, separators=(",", ":"))
        with self._path.open("ab") as file:
            file.write(f"{_sum(text)} {text}\n".encode())
        self._book.add(fields)

    # ------------------------------------------------------------------------------------------------------ opening
    def _read(self, key: str) -> list[_Record]:
        """Return the records up to the first damaged line; a last line that was cut off is no damage."""
        data = self._path.read_bytes() if self._path.is_file() else b""
        records: list[_Record] = []
        end = 0
        for line in data.splitlines(keepends=True):
            end += len(line)
            fields = _fields(line)
            if fields is None:
                if end < len(data) or line.endswith(b"\n"):
                    self.problem = f"line {len(records) + 1} of its journal is damaged"
                break
            if not records and (fields.get("journal"), fields.get("key")) != (_SCHEMA, key):
                self.problem = "its journal is of another build"
                break
            records.append(_Record(fields, end))
        return records

    def _believed(self, records: list[_Record]) -> _Book:
        """Cut `records`, in place, before the first one that does not hold; return what the others say."""
        self._cut(records, _first_wrong_weight(self.folder, records))
        digests: dict[str, str | None] = {}
        while True:
            book = _Book()
            for record in records:
                book.add(record.fields)
            for name in book.files:
                if name not in digests:
                    digests[name] = hash_file(self.folder / name) if (self.folder / name).is_file() else None
            wrong = [name for name, digest in book.files.items() if digests[name] != digest]
            if not wrong:
                return book
            self._cut(records, next((i, n) for i, r in enumerate(records) for n in wrong if n in r.fields.get("files", {})))

    def _cut(self, records: list[_Record], at: tuple[int, str] | None) -> None:
        if at is not None:
            del records[at[0] :]
            self.problem = self.problem or f"{at[1]} is not as it was written"

    def _clean(self, rebuilt: Callable[[str], bool]) -> None:
        """Remove what no record answers for."""
        known = self._book.files.keys() | self._book.ends.keys()
        for path in sorted(self.folder.rglob("*"), reverse=True):  # what is in a folder comes before the folder
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif name != JOURNAL and name not in known and not rebuilt(name):
                path.unlink()
        for name, end in self._book.ends.items():
            os.truncate(self.folder / name, end)


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_CHECK]


def _fields(line: bytes) -> dict[str, Any] | None:
    """Read one line; None when it is damaged."""
    try:
        check, _, text = line.decode("utf-8").removesuffix("\n").partition(" ")
        fields = json.loads(text) if check == _sum(text) and line.endswith(b"\n") else None
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _first_wrong_weight(folder: Path, records: list[_Record]) -> tuple[int, str] | None:
    """Return the first record of a tensor whose bytes are not those that were written, and its file; read in the order of the records."""
    ends: dict[str, int] = {}
    for index, record in enumerate(records):
        if "weight" not in record.fields:
            continue
        name, end = str(record.fields["file"]), int(record.fields["offset"]) + int(record.fields["length"])
        if _hash_range(folder / name, ends.get(name, 0), end) != record.fields["sha256"]:
            return index, name
        ends[name] = end
    return None


def _hash_range(path: Path, start: int, end: int) -> str | None:
    """Return the sha256 of some bytes of a file; None when it ends before them."""
    if not path.is_file() or path.stat().st_size < end:
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(_BLOCK, end - start))):
            digest.update(block)
            start += len(block)
    return digest.hexdigest()
