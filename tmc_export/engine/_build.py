"""Builds one engine inside the worker process, with `tensorrt_rtx` or `tensorrt`: the two share their Python interface."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tmc_export.core.errors import ExportError, LegalityError, ResourceError
from tmc_export.core.files import write_whole
from tmc_export.engine._layers import activation_bytes, parse_layers
from tmc_export.engine._memory import peak_rss_bytes
from tmc_export.engine._types import RtxBuilderConfig, RtxModule, TensorRT, or_none, sizes
from tmc_export.engine._versions import version_for
from tmc_export.engine.options import EngineOptions, EngineReport, Profile

if TYPE_CHECKING:
    import tensorrt

__all__ = ["Job", "build", "refusal"]

Emit = Callable[[str, int, int], None]
"""Called with a phase, the steps done and the steps in all."""

_NOISE = "has Int64 binding."
"""Said of every int64 input and output since TensorRT keeps their type; nothing to act on."""

_KEPT: list[Any] = []
"""Loggers, never released: TensorRT keeps the first one it was given and crashes when it is gone."""


@dataclass(frozen=True)
class Job:
    """One engine: the graph (weights beside it), its profiles, the file to write and the options."""

    name: str
    onnx: Path
    profiles: tuple[Profile, ...]
    out: Path
    options: EngineOptions


@dataclass
class _Log:
    """What is kept of the builder's log."""

    layers: str
    info: list[str]
    warnings: list[str]
    errors: list[str]


def _logger(trt: TensorRT, log: _Log) -> tensorrt.ILogger:
    if TYPE_CHECKING:
        from tensorrt import ILogger
    else:
        ILogger = trt.ILogger

    class Logger(ILogger):
        def __init__(self) -> None:
            ILogger.__init__(self)

        def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
            if msg.startswith("Layers:"):
                log.layers += msg + "\n"
            elif severity == ILogger.INFO:
                log.info.append(msg)
            elif severity == ILogger.WARNING and not msg.endswith(_NOISE):
                log.warnings.append(msg)
            elif severity in (ILogger.ERROR, ILogger.INTERNAL_ERROR):
                log.errors.append(msg)

    logger = Logger()
    _KEPT.append(logger)
    return logger


def _monitor(trt: TensorRT, emit: Emit) -> tensorrt.IProgressMonitor:
    if TYPE_CHECKING:
        from tensorrt import IProgressMonitor
    else:
        IProgressMonitor = trt.IProgressMonitor

    class Monitor(IProgressMonitor):
        def __init__(self) -> None:
            IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            emit(phase_name, 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            total = self.totals.pop(phase_name, 0)
            emit(phase_name, total, total)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

    return Monitor()


def _writer(trt: TensorRT, file: BinaryIO, failed: list[OSError]) -> tensorrt.IStreamWriter:
    if TYPE_CHECKING:
        from tensorrt import IStreamWriter
    else:
        IStreamWriter = trt.IStreamWriter

    class Writer(IStreamWriter):
        def __init__(self) -> None:
            IStreamWriter.__init__(self)

        def write(self, data: Any, *_: Any) -> int:
            try:
                return int(file.write(data))
            except OSError as error:  # must not pass through C++; reported after the build
                failed.append(error)
                return 0

    return Writer()


def _parse(trt: TensorRT, builder: tensorrt.Builder, logger: tensorrt.ILogger, job: Job, row_flag: bool) -> tensorrt.INetworkDefinition:
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if row_flag else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    _KEPT.append(parser)  # the network's weights live in it
    if parser.parse_from_file(str(job.onnx)):
        return network
    raise ExportError(f"{job.name}: the TensorRT parser refuses {job.onnx.name}: {_reasons(parser)}")


def _reasons(parser: tensorrt.OnnxParser) -> str:
    """Return what a parser says of a graph that it refused."""
    found = []
    for index in range(parser.num_errors):
        error: tensorrt.ParserError = parser.get_error(index)
        place = f"{error.func()} at {error.file()}:{error.line()}"
        found.append(f"{error.node_operator() or 'no operator'} '{error.node_name()}': {error.desc()} ({place})")
    return "; ".join(found) or "it gives no reason"


def refusal(onnx: Path, trt: TensorRT) -> str | None:
    """Return why the parser refuses a graph; None when it takes it. Nothing is built."""
    logger = _logger(trt, _Log("", [], [], []))
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    _KEPT.extend((builder, network, parser))
    return None if parser.parse_from_file(str(onnx)) else _reasons(parser)


def _add_profiles(
    trt: TensorRT, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, job: Job
) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for profile in job.profiles:
        shapes, where = dict(profile.shapes), f"{job.name}, profile '{profile.name}'"
        unknown = sorted(set(shapes) - {tensor.name for tensor in inputs})
        if unknown:
            raise ExportError(f"{where}: the graph has no input {', '.join(unknown)}; build the bundle again")
        made = builder.create_optimization_profile()
        for tensor in inputs:
            own = sizes(tensor.shape)
            shape = shapes.get(tensor.name, own)
            if any(size < 0 for size in shape) or len(shape) != len(own):
                raise ExportError(f"{where}: input {tensor.name} {own} gets the shape {shape}; name every dimension")
            if any(mine >= 0 and mine != size for mine, size in zip(own, shape, strict=True)):
                raise ExportError(f"{where}: input {tensor.name} is {own} in the graph, the profile says {shape}")
            if any(size < 0 for size in own):
                dims = trt.Dims(list(shape))
                made.set_shape(tensor.name, dims, dims, dims)
        if config.add_optimization_profile(made) < 0:
            raise ExportError(f"{job.name}: TensorRT refuses the profile '{profile.name}' {shapes}")


def _set_capabilities(trt: TensorRT, config: RtxBuilderConfig, names: tuple[str, ...]) -> None:
    known = cast("RtxModule", trt).ComputeCapability
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        capability = getattr(known, name, None)
        if capability is None:
            raise LegalityError(f"TensorRT-RTX {trt.__version__} does not know {name}; install a newer one or leave it out")
        if not config.set_compute_capability(capability, index):
            raise LegalityError(f"TensorRT-RTX {trt.__version__} refuses {name} as GPU {index + 1} of {', '.join(names)}; leave it out")


def _configure(trt: TensorRT, builder: tensorrt.Builder, job: Job, emit: Emit, log: _Log) -> tensorrt.IBuilderConfig:
    options = job.options
    config = builder.create_builder_config()
    if options.flavour == "tensorrt-rtx":
        _set_capabilities(trt, cast("RtxBuilderConfig", config), options.capabilities)
    config.builder_optimization_level = options.builder_optimization_level
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, options.verbosity.upper())
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
    if options.timing_cache is not None and options.flavour == "tensorrt":
        kept = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(kept), False):
            log.warnings.append(f"the timing cache {options.timing_cache} is of another GPU or TensorRT; kernels are timed anew")
    config.progress_monitor = _monitor(trt, emit)
    _KEPT.append(config.progress_monitor)
    return config


def _serialize(
    trt: TensorRT, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, job: Job
) -> bool:
    """Write the engine to `job.out` through a temporary file; False when the builder fails."""
    partial = job.out.with_name(f".{job.out.name}.{os.getpid()}.partial")
    failed: list[OSError] = []
    try:
        with partial.open("wb") as file:
            if hasattr(builder, "build_serialized_network_to_stream"):
                done = bool(builder.build_serialized_network_to_stream(network, config, _writer(trt, file, failed)))
            else:
                plan = or_none(builder.build_serialized_network(network, config))
                done = plan is not None
                if plan is not None:
                    file.write(memoryview(plan))
            file.flush()
            os.fsync(file.fileno())
        if failed:
            raise failed[0]
        if done and partial.stat().st_size:
            os.replace(partial, job.out)
            return True
        return False
    except OSError as error:
        raise ResourceError(f"{job.name}: cannot write the engine '{job.out}': {error.strerror}; free disk space and retry") from error
    finally:
        partial.unlink(missing_ok=True)


def _save_timing_cache(config: tensorrt.IBuilderConfig, options: EngineOptions) -> str | None:
    """Keep what was measured; why it could not be written, which an engine that is built does not fail for."""
    if options.timing_cache is None or options.flavour != "tensorrt":
        return None
    cache = or_none(config.get_timing_cache())
    if cache is None:
        return None
    try:
        write_whole(options.timing_cache, bytes(cache.serialize()))
    except OSError as error:
        return f"the timing cache {options.timing_cache} cannot be written: {error.strerror}"
    return None


def build(job: Job, trt: TensorRT, emit: Emit, capabilities: tuple[str, ...]) -> EngineReport:
    """Build one engine.

    Args:
        job: what to build.
        trt: the module `tensorrt_rtx` or `tensorrt`.
        emit: told of every phase.
        capabilities: what the report says the engine is for (`tensorrt`: the GPU of this machine).

    Raises:
        ExportError: the graph does not parse or build.
        ResourceError: the disk is full.
        LegalityError: a compute capability this TensorRT lacks.
    """
    started = time.monotonic()
    version = trt.__version__
    log = _Log("", [], [], [])
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    flag = job.options.flavour == "tensorrt" and version_for(version).strongly_typed_flag
    network = _parse(trt, builder, logger, job, flag)
    config = _configure(trt, builder, job, emit, log)
    _add_profiles(trt, builder, network, config, job)
    if not _serialize(trt, builder, network, config, job):
        reason = " | ".join(line.replace("\n", " ") for line in log.errors[:3])
        raise ExportError(f"{job.name}: TensorRT {version} parses the graph and cannot build it: {reason or 'it gives no reason'}")
    if problem := _save_timing_cache(config, job.options):
        log.warnings.insert(0, problem)
    layers = parse_layers(log.layers)
    return EngineReport(
        name=job.name,
        path=job.out,
        flavour=job.options.flavour,
        version=version,
        capabilities=capabilities,
        size=job.out.stat().st_size,
        seconds=round(time.monotonic() - started, 3),
        peak_rss=peak_rss_bytes(),
        layers=layers,
        multi_head_attention=sum(layer.attention for layer in layers),
        activation_bytes=activation_bytes(log.info),
        profiles=tuple(profile.name for profile in job.profiles),
        warnings=tuple(log.warnings[:20]),
    )
