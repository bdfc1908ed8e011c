"""Engines that this machine has built, kept by what they were built from, for other bundles and for later builds.

`engines/<key>/` in the cache's folder holds `engine` and `report.json`, and appears whole; `<key>.lock` is held while an engine of that key
is built, so that of two builds at once one builds and the other takes what it built. An engine lies on the disk once: the cache and a
bundle on the same file system link to one file. Above the cache's limit, what was used longest ago goes first.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tmc_export.core.cache import cache_bytes, cache_folder
from tmc_export.core.digest import hash_file
from tmc_export.core.files import write_whole
from tmc_export.core.locks import held, try_lock
from tmc_export.engine._wire import report_fields, report_from
from tmc_export.engine.options import EngineReport

__all__ = ["EngineCache", "engine_cache", "place"]

_ENGINE, _REPORT = "engine", "report.json"


def engine_cache() -> EngineCache | None:
    """Return this machine's cache; None when it is switched off.

    Raises:
        RuntimeInputError: its limit is no number.
    """
    limit = cache_bytes()
    return EngineCache(cache_folder() / "engines", limit) if limit else None


class EngineCache:
    """A folder of engines.

    Args:
        folder: made when the first engine is kept.
        limit: bytes that the engines may take together; a larger engine is not kept.

    Attributes:
        problems: why the cache could not be used, and what was wrong with engines in it, each once.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.problems: list[str] = []

    @contextmanager
    def building(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """While active, nobody else builds an engine of this key; where the folder cannot be written, hold nothing.

        Args:
            key: hash of what the engine is built from.
            waiting: called when somebody else does, before the wait.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{key}.lock").touch()
        except OSError as error:
            self._cannot(error)
            yield
            return
        with held(self.folder / f"{key}.lock", waiting):
            for dead in self.folder.glob(f".{key}.*"):  # of a builder that was killed: it had this lock
                shutil.rmtree(dead, ignore_errors=True)
            yield

    def take(self, key: str, out: Path) -> EngineReport | None:
        """Place an engine at `out` and return the report of its build; None when there is none, or it is damaged, which `problems` says.

        Raises:
            OSError: `out` cannot be written.
        """
        entry = self.folder / key
        try:
            fields = json.loads((entry / _REPORT).read_text("utf-8"))
            size, digest, report = int(fields["bytes"]), str(fields["sha256"]), report_from(fields["report"])
            engine = entry / _ENGINE
            whole = engine.is_file() and engine.stat().st_size == size and hash_file(engine) == digest
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._cannot(error)
            return None
        except (KeyError, TypeError, ValueError) as error:
            self._damaged(entry, f"{type(error).__name__}: {error}")
            return None
        if not whole:
            self._damaged(entry, "its bytes are not those that were kept")
            return None
        place(engine, out)
        try:
            os.utime(entry / _REPORT)
        except OSError as error:
            self._cannot(error)
        return replace(report, path=out)

    def keep(self, key: str, report: EngineReport) -> None:
        """Keep an engine that was built, and remove what is above the limit; a cache that cannot be written is said in `problems`."""
        if report.size > self.limit:
            return
        part, entry = self.folder / f".{key}.{os.getpid()}", self.folder / key
        try:
            part.mkdir(parents=True)
            place(report.path, part / _ENGINE)
            fields = {"bytes": report.size, "sha256": hash_file(part / _ENGINE), "report": report_fields(report)}
            write_whole(part / _REPORT, json.dumps(fields) + "\n")
            shutil.rmtree(entry, ignore_errors=True)
            part.rename(entry)
            self._shrink(key)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            self._cannot(error)

    def content(self) -> tuple[int, int]:
        """Return how many engines there are, and their bytes."""
        sizes = [size for _, size, _ in self._entries()]
        return len(sizes), sum(sizes)

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Time of the last use, bytes and folder of every engine, the one used longest ago first."""
        found = []
        for path in self.folder.glob(f"[0-9a-f]*/{_REPORT}"):
            try:
                found.append((path.stat().st_mtime, (path.parent / _ENGINE).stat().st_size, path.parent))
            except OSError:
                continue  # removed meanwhile
        return sorted(found)

    def _shrink(self, but: str) -> None:
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if total <= self.limit:
                return
            if entry.name != but and self._remove(entry):
                total -= size

    def _remove(self, entry: Path) -> bool:
        """Remove an engine unless somebody holds its lock."""
        try:
            lock = os.open(entry.with_name(f"{entry.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return False
        try:
            if try_lock(lock) is False:
                return False
            shutil.rmtree(entry, ignore_errors=True)
            entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
            return True
        finally:
            os.close(lock)

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _cannot(self, error: OSError) -> None:
        self._note(f"the engine cache {self.folder} cannot be used: {error.strerror or error}")

    def _damaged(self, entry: Path, why: str) -> None:
        self._note(f"an engine in the cache was damaged ({entry.name[:16]}: {why}); it was built again")
        shutil.rmtree(entry, ignore_errors=True)


def place(source: Path, out: Path) -> None:
    """Make `out` the same file as `source`, or a copy of it on another file system; it appears whole.

    Raises:
        OSError: it cannot be written.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
    try:
        try:
            os.link(source, partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)  # also when both names were the same file: then the system renames nothing
