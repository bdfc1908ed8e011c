"""Builds one engine in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmc_export.core.errors import BundleError, ExportError, LegalityError, MissingExtraError, ResourceError, TmcError
from tmc_export.core.files import write_whole
from tmc_export.engine._build import Job
from tmc_export.engine._memory import available_bytes, check_memory, estimate_bytes, gib
from tmc_export.engine._proto import GraphFacts, read_graph, with_plain_locations
from tmc_export.engine._versions import check_graph, version_for
from tmc_export.engine._wire import job_to_json, report_fields, report_from
from tmc_export.engine.options import EngineOptions, EngineReport, Profile

__all__ = ["WAITING", "Builder", "Progress", "build_engine", "parse_graph", "probe", "save_layers", "weight_files"]

Progress = Callable[[str, str, int, int], None]
"""Called with the engine's name, the builder's phase, the steps done and the steps in all."""
WAITING = "waiting for another build"
"""A phase of its own: somebody else builds here, or builds the same engine."""

_ERRORS: dict[str, type[TmcError]] = {kind.__name__: kind for kind in (ExportError, LegalityError, MissingExtraError, ResourceError)}
_ROOT = Path(__file__).resolve().parents[2]
_EXTRAS = {
    "tensorrt-rtx": "install it with: pip install 'tmc-export[rtx]'",
    "tensorrt": "JetPack brings it; on a Jetson: sudo apt install nvidia-jetpack",
}


@dataclass(frozen=True)
class Builder:
    """What builds here: flavour, exact version, and (for `tensorrt`) the compute capability of this machine's GPU."""

    flavour: str
    version: str
    capabilities: tuple[str, ...]


def weight_files(onnx: Path, facts: GraphFacts) -> tuple[Path, ...]:
    """Return the external weight files of a graph: as the location says, else of that name beside it or in `../onnx/`.

    Raises:
        BundleError: a file is in none of these places.
    """
    found = []
    for location in facts.locations:
        name = Path(location).name
        places = [onnx.parent / location, onnx.parent / name, onnx.parent.parent / "onnx" / name]
        present = [place for place in places if place.is_file()]
        if not present:
            raise BundleError(f"'{onnx}' needs the weight file '{location}', which is missing; build the bundle again")
        found.append(present[0].resolve())
    return tuple(found)


@contextmanager
def _staged(onnx: Path, facts: GraphFacts, files: tuple[Path, ...]) -> Iterator[Path]:
    """Give the graph in a folder where its weights lie beside it, as TensorRT's parser wants them; nothing is copied but the graph."""
    if all((onnx.parent / location).is_file() and Path(location).name == location for location in facts.locations):
        yield onnx
        return
    folder = Path(tempfile.mkdtemp(prefix="tmc-engine-"))
    try:
        graph = folder / onnx.name
        graph.write_bytes(with_plain_locations(onnx.read_bytes()))
        for path in files:
            (folder / path.name).symlink_to(path)
        yield graph
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    for line in process.stdout or ():
        try:
            fields = json.loads(line)
        except ValueError:
            continue  # cut short by a crash; the exit status says so
        if isinstance(fields, dict):
            yield fields


def _died(name: str, status: int, stderr: str) -> TmcError:
    tail = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "no message")
    if status == -signal.SIGKILL:
        free = available_bytes()
        figure = f"; {gib(free)} are free now" if free is not None else ""
        return ResourceError(
            f"the build of {name} was killed, most likely for want of memory{figure}; "
            "cut the decoder into more blocks (target.build_memory_gib)"
        )
    if status < 0:
        return ExportError(f"the TensorRT builder crashed on {name} with {signal.Signals(-status).name}: {tail}")
    return ExportError(f"the TensorRT builder ended with status {status} on {name}: {tail}")


def _call(name: str, request: str, on_phase: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run the worker on one request; return its last answer."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        command = [sys.executable, "-m", "tmc_export.engine._worker", str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            if process.stdin is not None:
                process.stdin.write(request)
                process.stdin.close()
            for fields in _lines(process):
                if "phase" in fields:
                    on_phase(str(fields["phase"]), int(fields["done"]), int(fields["total"]))
                else:
                    answer = fields
            status = process.wait()
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()
        log.seek(0)
        if not answer:
            raise _died(name, status, log.read())
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["message"])
    return answer


def probe(flavour: str) -> Builder:
    """Say which TensorRT of this flavour is installed.

    Raises:
        MissingExtraError: none; names what brings it.
    """
    try:
        answer = _call(flavour, json.dumps({"probe": flavour}), lambda phase, done, total: None)
    except MissingExtraError as error:
        raise MissingExtraError(f"cannot build {flavour} engines: {error}; {_EXTRAS[flavour]}") from error
    return Builder(flavour, str(answer["version"]), tuple(answer["capabilities"]))


def parse_graph(onnx: Path) -> str | None:
    """Let TensorRT-RTX's parser read a graph, in a process of its own; needs no GPU.

    Args:
        onnx: the graph, its external weights beside it.

    Returns:
        Why it is refused (operator, node and reason, as the parser says it), or None.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        ExportError: the parser crashed.
    """
    try:
        answer = _call(onnx.name, json.dumps({"parse": str(onnx.absolute())}), lambda phase, done, total: None)
    except MissingExtraError as error:
        raise MissingExtraError(f"cannot parse {onnx.name} with TensorRT-RTX: {error}; {_EXTRAS['tensorrt-rtx']}") from error
    refused: str | None = answer["refusal"]
    return refused


def build_engine(
    onnx: Path,
    profiles: tuple[Profile, ...],
    out: Path,
    options: EngineOptions,
    progress: Progress | None = None,
    *,
    precision: str = "float16",
    builder: Builder | None = None,
) -> EngineReport:
    """Build one engine and write `<out>` and, beside it, `<out>.layers.json`.

    Args:
        onnx: the graph; its external weights beside it, or in `../onnx/`.
        profiles: static shapes, at least one; an empty profile for a static graph.
        out: the engine file; it appears complete or not at all.
        options: flavour, compute capabilities, limits.
        progress: told of the builder's phases.
        precision: `"int4"` needs more memory than its weights suggest.
        builder: what `probe` answered, to spare asking again.

    Raises:
        MissingExtraError: TensorRT is not installed.
        ResourceError: memory or disk does not suffice, or the builder was killed.
        LegalityError: an operator or compute capability this TensorRT lacks.
        ExportError: the graph does not parse or build.
        BundleError: a file is missing.
    """
    if not profiles:
        raise ExportError(f"'{onnx}' has no profile; give one empty profile for a static graph")
    name = out.name.split(".")[0]
    builder = builder or probe(options.flavour)
    facts = read_graph(onnx)
    warnings = check_graph(name, facts, version_for(builder.version)) if options.flavour == "tensorrt" else ()
    files = weight_files(onnx, facts)
    if options.check_memory:
        check_memory(name, estimate_bytes(facts.bytes, files, precision), available_bytes())
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _staged(onnx, facts, files) as graph:
            job = Job(name, graph.absolute(), profiles, out.absolute(), options)
            answer = _call(name, job_to_json(job), lambda phase, done, total: progress(name, phase, done, total) if progress else None)
    finally:  # a builder that was killed leaves its file behind
        for partial in out.parent.glob(f".{out.name}.*.partial"):
            partial.unlink(missing_ok=True)
    report = report_from({**answer["report"], "warnings": [*warnings, *answer["report"]["warnings"]]})
    save_layers(report)
    return report


def save_layers(report: EngineReport) -> None:
    """Write `<engine>.layers.json` beside the engine of a report.

    Raises:
        OSError: it cannot be written.
    """
    fields = {**report_fields(report), "path": report.path.name}
    write_whole(report.path.with_name(report.path.name + ".layers.json"), json.dumps(fields, indent=1) + "\n")
