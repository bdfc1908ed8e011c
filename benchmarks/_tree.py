"""The memory of a process and of all that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import REPOSITORY

__all__ = ["run_json_in_tree", "tree_memory"]

_EVERY_S = 0.1
_SHARED_EVERY = 5
"""`smaps_rollup` walks every page: it is read at every fifth look."""


def tree_memory(root: int) -> dict[int, dict[str, int]]:
    """Memory of a process and its descendants, KiB: process → `VmRSS` (pages of mapped files count) and `RssAnon`."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(folder.name))
    found: dict[int, dict[str, int]] = {}
    waiting = [root]
    while waiting:
        process = waiting.pop()
        waiting += parents.get(process, [])
        found[process] = _fields(Path(f"/proc/{process}/status"), ("VmRSS", "RssAnon"))
    return found


def _fields(path: Path, names: Sequence[str]) -> dict[str, int]:
    found = dict.fromkeys(names, 0)
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text("ascii").splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0])
    return found


def run_json_in_tree(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Run a process to its end and watch it, with all that it starts, from outside.

    Returns:
        The JSON object that its last line of output is; and `seconds`, with the peaks over time of sums over the tree, in MiB: `rss_mib`
        (resident memory, mapped files included; what two processes share counts twice), `anonymous_mib` (what they made themselves), and
        `pss_mib` (as the first, with what is shared counted once; looked at less often).

    Raises:
        SystemExit: it failed.
    """
    peaks = {"rss_mib": 0.0, "anonymous_mib": 0.0, "pss_mib": 0.0}
    began = time.perf_counter()
    found = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, env=found, cwd=REPOSITORY)
    ended = threading.Event()

    def watch() -> None:
        looks = 0
        while not ended.wait(_EVERY_S):
            tree = tree_memory(process.pid)
            now = {"rss_mib": sum(p["VmRSS"] for p in tree.values()), "anonymous_mib": sum(p["RssAnon"] for p in tree.values())}
            if looks % _SHARED_EVERY == 0:
                now["pss_mib"] = sum(_fields(Path(f"/proc/{p}/smaps_rollup"), ("Pss",))["Pss"] for p in tree)
            for name, value in now.items():
                peaks[name] = max(peaks[name], value / 1024)
            looks += 1

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    out, _ = process.communicate()
    seconds = time.perf_counter() - began
    ended.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(out.decode().strip().splitlines()[-1]), {"seconds": seconds, **peaks}
