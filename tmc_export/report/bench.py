"""How fast a bundle is, alone or against another: separate processes that take turns, medians and spread, predicted beside measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tmc_export.bundle.read import open_manifest
from tmc_export.core import errors
from tmc_export.core.errors import BundleError, ResourceError, TmcError
from tmc_export.report._bench_worker import Job

__all__ = ["BenchResult", "Compared", "Measured", "Predicted", "Spread", "bench"]


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some figures, and how many there were."""

    median: float
    least: float
    most: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread | None:
        """Summarise; None where there is nothing."""
        return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


@dataclass(frozen=True)
class Predicted:
    """What the plan said, a lower bound for the recipe's device.

    Attributes:
        device: the recipe's device; the bundle may have been timed on another machine.
        first_token_ms, token_ms: None where no time is predicted.
        memory_mib: while it runs.
        prompt_operations: before the first token, in 10⁹.
        why_not: why there are no times; empty when there are.
    """

    device: str
    first_token_ms: float | None
    token_ms: float | None
    memory_mib: float | None
    prompt_operations: float | None
    why_not: str


@dataclass(frozen=True)
class Measured:
    """One bundle.

    Attributes:
        folder, name: of the bundle.
        first_token_ms: from picture and prompt to the first token; every run of every process.
        token_ms: one decode step; None where the bundle has no room for one.
        load_ms: from nothing to ready, one a process.
        peak_mib: the most resident memory of a process; None where the system does not say.
        prompt_tokens: tokens of the prompt, visual tokens included.
        visual_tokens: after the projector, then after each cut.
        bundle_bytes: size of `onnx/`.
        predicted: None where the bundle carries no plan report.
    """

    folder: str
    name: str
    first_token_ms: Spread
    token_ms: Spread | None
    load_ms: Spread
    peak_mib: Spread | None
    prompt_tokens: int
    visual_tokens: tuple[int, ...]
    bundle_bytes: int
    predicted: Predicted | None


@dataclass(frozen=True)
class Compared:
    """First bundle ÷ second; of times, the ratio of the medians of each pair of processes. Below 1 the first is faster, or smaller.

    Attributes:
        first_token, token, peak, bundle: measured.
        prompt_operations: predicted, to be seen beside `first_token`.
    """

    first_token: Spread
    token: Spread | None
    peak: Spread | None
    bundle: float
    prompt_operations: float | None


@dataclass(frozen=True)
class BenchResult:
    """What was measured: one or two bundles, and how they compare."""

    bundles: tuple[Measured, ...]
    compared: Compared | None


def bench(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    runs: int = 5,
    images: Sequence[str] = (),
    prompt: str = "what is in the picture",
    answers: int = 3,
    tokens: int = 16,
    backend: str = "onnxruntime",
    threads: int | None = None,
    provider: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Time a bundle, or two in turns.

    Args:
        folder: the bundle.
        against: another bundle.
        runs: processes for each bundle.
        images: pictures; noise when empty.
        prompt: the question.
        answers: timed times to the first token in a process.
        tokens: timed single tokens in a process.
        backend: as `tmc_export.load` takes it.
        threads: CPU threads; None: the runtime's choice.
        provider: what onnxruntime uses, as `tmc_export.load` takes it.
        progress: called with one line per process.

    Raises:
        TmcError: what the runtime raises, or a process that ended without an answer.
    """
    folders = [str(folder), *([] if against is None else [str(against)])]
    manifests = [open_manifest(Path(f)) for f in folders]
    jobs = [Job(f, tuple(images), prompt, answers, tokens, backend, threads, provider) for f in folders]
    found: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for run in range(runs):
        order = range(len(jobs)) if run % 2 == 0 else range(len(jobs) - 1, -1, -1)  # ABBA: neither is always first
        for index in order:
            progress(f"run {run + 1} of {runs}: {folders[index]}")
            found[index].append(_run(jobs[index]))
    measured = tuple(
        _measured(f, m.name, sum(e.size for n, e in m.files.items() if n.startswith("onnx/")), r)
        for f, m, r in zip(folders, manifests, found, strict=True)
    )
    return BenchResult(measured, None if against is None else _compare(measured, found))


def _run(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-m", "tmc_export.report._bench_worker"]
    done = subprocess.run(command, input=json.dumps(asdict(job)), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == -9:
        raise ResourceError(f"{job.bundle}: the process was killed, as the system does when memory runs out; free memory or compress more")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise BundleError(f"{job.bundle}: the process that timed it ended with code {done.returncode}; try: tmc-export run {job.bundle}")
    result: dict[str, Any] = json.loads(lines[-1])
    if "error" in result:
        kind = getattr(errors, result["error"], TmcError)
        raise kind(result["message"])
    return result


def _measured(folder: str, name: str, size: int, runs: list[dict[str, Any]]) -> Measured:
    first = Spread.of([t for run in runs for t in run["first_token_ms"]])
    load = Spread.of([run["load_ms"] for run in runs])
    if first is None or load is None:
        raise TmcError(f"{folder}: nothing was measured; give --runs 1 or more")
    return Measured(
        folder=folder,
        name=name,
        first_token_ms=first,
        token_ms=Spread.of([t for run in runs for t in run["token_ms"]]),
        load_ms=load,
        peak_mib=Spread.of([run["peak_mib"] for run in runs if run["peak_mib"] is not None]),
        prompt_tokens=runs[0]["prompt_tokens"],
        visual_tokens=tuple(runs[0]["visual_tokens"]),
        bundle_bytes=size,
        predicted=_predicted(Path(folder)),
    )


def _predicted(folder: Path) -> Predicted | None:
    """Read the estimate that `build` left in `report/plan.json`."""
    path = folder / "report" / "plan.json"
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text("utf-8"))
        cost = report["estimate"]
        first, token = cost["first_token_s"], cost["token_s"]
        return Predicted(
            device=str(report["device"]),
            first_token_ms=None if first is None else first * 1e3,
            token_ms=None if token is None else token * 1e3,
            memory_mib=report["memory"]["run"]["total"] / 2**20,
            prompt_operations=sum(v for part, v in cost["flops"].items() if part != "decode") / 1e9,
            why_not=cost["no_times"] or "",
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is not a plan report ({type(error).__name__}: {error}); build the bundle again") from error


def _compare(measured: tuple[Measured, ...], runs: list[list[dict[str, Any]]]) -> Compared:
    def ratio(key: str) -> Spread | None:
        pairs = [(a[key], b[key]) for a, b in zip(*runs, strict=True)]
        if any(not a or not b for a, b in pairs):
            return None
        return Spread.of([statistics.median(_list(a)) / statistics.median(_list(b)) for a, b in pairs])

    first = ratio("first_token_ms")
    if first is None:
        raise TmcError("nothing was measured; give --runs 1 or more")
    operations = [m.predicted.prompt_operations if m.predicted else None for m in measured]
    return Compared(
        first_token=first,
        token=ratio("token_ms"),
        peak=ratio("peak_mib"),
        bundle=measured[0].bundle_bytes / measured[1].bundle_bytes,
        prompt_operations=operations[0] / operations[1] if operations[0] and operations[1] else None,
    )


def _list(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]
