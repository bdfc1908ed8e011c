"""Builds every engine of a bundle, keeping those that are still valid, and writes `engines/engines.json`.

Of two at once in one bundle, the second waits and finds what the first has built.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tmc_export.core.digest import hash_file as file_sha256
from tmc_export.core.errors import BundleError
from tmc_export.core.files import write_whole
from tmc_export.core.locks import held
from tmc_export.engine._device import cuda_device
from tmc_export.engine._proto import read_graph
from tmc_export.engine._wire import report_from
from tmc_export.engine.build import WAITING, Builder, Progress, build_engine, probe, save_layers, weight_files
from tmc_export.engine.cache import EngineCache
from tmc_export.engine.options import RTX_CAPABILITIES, EngineOptions, EngineReport, Subgraph
from tmc_export.engine.profiles import read_profiles

__all__ = [
    "ENGINES", "EngineRecord", "build_engines", "default_capabilities", "engine_file", "file_sha256", "read_engines", "same_release",
    "subgraph_key",
]  # fmt: skip

ENGINES = "engines/engines.json"


@dataclass(frozen=True)
class EngineRecord:
    """One line of `engines/engines.json`.

    Attributes:
        name, flavour, version, capabilities: as in `EngineReport`.
        file: path below the bundle.
        bytes, sha256: of that file.
        key: hash of everything the engine was made from; another key means a rebuild.
        profiles: names, in the engine's order.
    """

    name: str
    flavour: str
    version: str
    capabilities: tuple[str, ...]
    file: str
    bytes: int
    sha256: str
    key: str
    profiles: tuple[str, ...]


def engine_file(name: str, flavour: str) -> str:
    """Return the path of an engine below its bundle: `engines/block_0.tensorrt-rtx.engine`."""
    return f"engines/{name}.{flavour}.engine"


def subgraph_key(bundle: Path, subgraph: Subgraph, options: EngineOptions, builder: Builder | None) -> str:
    """Hash the graph, its weights, the profiles, the options that matter and the builder's version."""
    graph = bundle / subgraph.onnx
    facts = read_graph(graph)
    parts = {
        "graph": file_sha256(graph),
        "weights": [file_sha256(path) for path in weight_files(graph, facts)],
        "profiles": [asdict(profile) for profile in subgraph.profiles],
        "builder": asdict(builder) if builder else None,
        "capabilities": list(options.capabilities) if options.flavour == "tensorrt-rtx" else [],
        "settings": [options.flavour, options.workspace_mib, options.builder_optimization_level, options.verbosity],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _record(fields: dict[str, Any]) -> EngineRecord:
    return EngineRecord(**{**fields, "capabilities": tuple(fields["capabilities"]), "profiles": tuple(fields["profiles"])})


def read_engines(bundle: Path) -> tuple[EngineRecord, ...]:
    """Return what `engines/engines.json` records; empty when no engine was built.

    Raises:
        BundleError: the file is damaged.
    """
    path = bundle / ENGINES
    if not path.is_file():
        return ()
    try:
        return tuple(_record(fields) for fields in json.loads(path.read_text())["engines"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"'{path}' is damaged ({type(error).__name__}: {error}); delete it and build the engines again") from error


def same_release(recorded: str, here: str) -> bool:
    """Say whether an engine of one version runs on another: only the same one. trtexec prints three numbers, Python four.

    >>> same_release("10.3.0", "10.3.0.30"), same_release("10.3.0.30", "10.3.1.2")
    (True, False)
    """
    return recorded.split(".")[:3] == here.split(".")[:3]


def default_capabilities(bundle: Path) -> tuple[str, ...]:
    """Return the TensorRT-RTX targets when nobody names one: those built for before, else this machine's GPU, else SM89."""
    before = [record.capabilities for record in read_engines(bundle) if record.flavour == "tensorrt-rtx"]
    if before:
        return before[0]
    device = cuda_device()
    return (device.capability,) if device and device.capability in RTX_CAPABILITIES else ("SM89",)


def _write(bundle: Path, records: dict[tuple[str, str], EngineRecord]) -> None:
    path = bundle / ENGINES
    ordered = [asdict(records[key]) for key in sorted(records)]
    write_whole(path, json.dumps({"schema": 1, "engines": ordered}, indent=1) + "\n")


def _kept(bundle: Path, record: EngineRecord | None, key: str) -> EngineReport | None:
    """Return the report of an engine that is still valid, or `None`."""
    if record is None or record.key != key:
        return None
    path = bundle / record.file
    if not path.is_file() or path.stat().st_size != record.bytes or file_sha256(path) != record.sha256:
        return None
    try:
        report = report_from(json.loads(path.with_name(path.name + ".layers.json").read_text()))
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return replace(report, path=path, seconds=0.0, built=False)


def build_engines(
    bundle_dir: Path,
    options: EngineOptions,
    progress: Progress | None = None,
    *,
    force: bool = False,
    cache: EngineCache | None = None,
) -> tuple[EngineReport, ...]:
    """Build every engine that `engines/profiles.json` names; stops at the first failure, and the next call goes on from there.

    Args:
        bundle_dir: the bundle.
        options: flavour, compute capabilities, limits.
        progress: told of the builder's phases.
        force: build again what is still valid, or in the cache.
        cache: engines that this machine has built before; what is built is kept there.

    Raises:
        MissingExtraError: TensorRT is not installed; the bundle is as valid as before.
        BundleError, LegalityError, ExportError, ResourceError: as `build_engine`.
    """
    subgraphs = read_profiles(bundle_dir)
    builder = probe(options.flavour)
    with held(bundle_dir / "engines", lambda: _wait("engines", progress)):
        records = {(record.name, record.flavour): record for record in read_engines(bundle_dir)}
        reports = []
        for subgraph in subgraphs:
            place = (subgraph.name, options.flavour)
            key = subgraph_key(bundle_dir, subgraph, options, builder)
            report = None if force else _kept(bundle_dir, records.get(place), key)
            if report is None:
                make = _Make(bundle_dir, subgraph, options, builder, progress)
                report = make.build() if cache is None else _cached(make, key, cache, force)
                digest = file_sha256(report.path)
                records[place] = EngineRecord(
                    subgraph.name, options.flavour, report.version, report.capabilities, engine_file(subgraph.name, options.flavour),
                    report.size, digest, key, report.profiles,
                )  # fmt: skip
                _write(bundle_dir, records)
            reports.append(report)
    return tuple(reports)


def _wait(name: str, progress: Progress | None) -> None:
    if progress is not None:
        progress(name, WAITING, 0, 0)


@dataclass(frozen=True)
class _Make:
    """One engine of a bundle that is to be made."""

    bundle: Path
    subgraph: Subgraph
    options: EngineOptions
    builder: Builder
    progress: Progress | None

    @property
    def out(self) -> Path:
        return self.bundle / engine_file(self.subgraph.name, self.options.flavour)

    def build(self) -> EngineReport:
        graph, precision = self.bundle / self.subgraph.onnx, self.subgraph.precision
        report = build_engine(
            graph, self.subgraph.profiles, self.out, self.options, self.progress, precision=precision, builder=self.builder
        )
        return replace(report, path=self.out)


def _cached(make: _Make, key: str, cache: EngineCache, force: bool) -> EngineReport:
    """Take an engine from the cache, or build it and keep it there.

    An engine of standard TensorRT is tuned on the GPU that built it: in the cache, which boards may share, its name is part of the key.
    """
    device = cuda_device() if make.options.flavour == "tensorrt" else None
    name = hashlib.sha256(f"{key} {device.name if device else ''}".encode()).hexdigest()
    known = len(cache.problems)
    with cache.building(name, lambda: _wait(make.subgraph.name, make.progress)):
        report = None if force else cache.take(name, make.out)
        if report is not None:
            report = replace(report, name=make.subgraph.name)
            save_layers(report)
            return replace(report, seconds=0.0, built=False, cached=True)
        report = make.build()
        cache.keep(name, report)
        return replace(report, warnings=(*report.warnings, *cache.problems[known:]))
