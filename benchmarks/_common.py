"""What every benchmark shares: processes of their own, alternated; medians with spread; what the machine is; the result file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "REPOSITORY", "RESULTS", "alternate", "child_memory", "hardware", "median_interval", "paired", "run_json", "save", "spread",
    "workplace",
]  # fmt: skip

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
_TOOLS = ("onnxruntime", "torch", "transformers", "onnx-ir", "onnxscript", "numpy")


def hardware() -> dict[str, object]:
    """Processor, cores, memory, versions; and how busy the machine was, which a reader of the figures must know."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    versions = {}
    for tool in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


@contextlib.contextmanager
def workplace(need_bytes: int, keep: str | None = None) -> Iterator[Path]:
    """A temporary folder that is removed whatever happens; `keep` names one that stays and is used again.

    Raises:
        SystemExit: the disk has too little room.
    """
    base = Path(keep) if keep else Path(tempfile.mkdtemp(prefix="tmc-bench-"))
    base.mkdir(parents=True, exist_ok=True)
    try:
        free = shutil.disk_usage(base).free
        if free < need_bytes:
            raise SystemExit(f"{base}: {free / 1e9:.0f} GB free, {need_bytes / 1e9:.0f} GB are needed; set TMPDIR to a larger disk")
        yield base
    finally:
        if not keep:
            shutil.rmtree(base, ignore_errors=True)


def run_json(command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a process of this repository and return the JSON object that its last line of output is."""
    found = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    done = subprocess.run(list(command), stdout=subprocess.PIPE, env=found, cwd=REPOSITORY, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.decode().strip().splitlines()[-1])
    return result


def child_memory(command: Sequence[str]) -> dict[str, float]:
    """Run a process to its end and watch its memory from outside, every 20 ms.

    Returns:
        `seconds`; the peaks, in MiB, of `rss_mib` (VmHWM: files that are mapped count), `anonymous_mib` (RssAnon: what the process made
        itself) and `file_mib` (RssFile).

    Raises:
        SystemExit: it failed.
    """
    peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    began = time.perf_counter()
    process = subprocess.Popen(list(command), env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, cwd=REPOSITORY)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            with contextlib.suppress(OSError, ValueError):
                for line in Path(f"/proc/{process.pid}/status").read_text("ascii").splitlines():
                    name, _, value = line.partition(":")
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value.split()[0]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    code = process.wait()
    seconds = time.perf_counter() - began
    ended.set()
    thread.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    names = {"VmHWM": "rss_mib", "RssAnon": "anonymous_mib", "RssFile": "file_mib"}
    return {"seconds": seconds, **{names[k]: v / 1024 for k, v in peaks.items()}}


def alternate(what: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run each measurement once per round, in turn, so that a slow minute of the machine meets all of them."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in what}
    for number in range(rounds):
        names = list(what) if number % 2 == 0 else list(what)[::-1]
        for name in names:
            found[name].append(what[name]())
            print(f"  round {number + 1}/{rounds} {name}: {_short(found[name][-1])}", file=sys.stderr, flush=True)
    return found


def _short(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {statistics.median(v):.1f}" for k, v in result.items() if isinstance(v, list) and v)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the median of what was drawn from with at least 95 % (binomial); the extremes below six values.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    (1.0, 7.0)
    """
    ordered, n = sorted(values), len(values)
    outside, rank = 0.0, 0
    while rank < n // 2 and outside + math.comb(n, rank) * 0.5**n <= 0.025:
        outside += math.comb(n, rank) * 0.5**n
        rank += 1
    rank = max(rank - 1, 0)
    return ordered[rank], ordered[n - 1 - rank]


def paired(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    """Ratio first ÷ second, round by round (medians within a process), and of the least times: the least suffers least from others."""
    ratios = [statistics.median(a[key]) / statistics.median(b[key]) for a, b in zip(first, second, strict=True)]
    least = min(min(a[key]) for a in first) / min(min(b[key]) for b in second)
    return {**spread(ratios), "of_least": least}


def save(name: str, result: Mapping[str, object]) -> Path:
    """Write `results/<name>.json` and the table of all results."""
    from benchmarks._table import write_table

    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "hardware": hardware(), **result}, indent=1) + "\n", encoding="utf-8")
    write_table(RESULTS)
    return path
