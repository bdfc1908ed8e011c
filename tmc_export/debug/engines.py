"""TensorRT-RTX's verdict on a bundle's graphs and on models cut out of them. No GPU is needed; nothing is executed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tmc_export.bundle.read import path_in
from tmc_export.core.errors import ExportError
from tmc_export.core.lazy import require
from tmc_export.debug.fault import Fault
from tmc_export.debug.graph import load_graph
from tmc_export.debug.localise import locate_refusal, workspace_of
from tmc_export.engine import EngineOptions, Profile, build_engine, parse_graph, read_profiles

__all__ = ["find_refusal"]

_CAPABILITY = "SM89"
"""What `build` builds for; which GPU matters little to what is refused, and this one has every type that TensorRT-RTX knows but FP4."""


def find_refusal(bundle: Path, check: str, subgraph: str | None, progress: Callable[[str], None]) -> tuple[Fault | None, int]:
    """Find the first graph that TensorRT-RTX refuses and shrink it.

    Args:
        bundle: the folder.
        check: `parse`, or `build` (which parses first).
        subgraph: only this file; every graph that becomes an engine when None.
        progress: called with each file before it is tried.

    Returns:
        The fault, or None, and how many graphs were tried.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        ResourceError: memory does not suffice to build.
    """
    wanted = [(s.onnx, s.profiles) for s in read_profiles(bundle) if subgraph in (None, s.onnx)]
    if subgraph is not None and not wanted:  # a graph that only onnxruntime runs
        wanted = [(subgraph, (Profile("static"),))]
    for file, profiles in wanted:
        progress(file)
        suspect = path_in(bundle, file)
        for profile in profiles[: 1 if check == "parse" else None]:
            model = load_graph(suspect) if check == "parse" else _static(load_graph(suspect), profile)
            with workspace_of(suspect) as space:
                refuses = parse_graph if check == "parse" else _build
                if (why := refuses(space.write(model))) is None:
                    continue
                kind: Any = "build" if check == "build" and why.startswith(_NO_BUILD) else "parse"
                return locate_refusal(file, kind, model, space, why, refuses, {}), len(wanted)
    return None, len(wanted)


_NO_BUILD = "cannot build"


def _build(onnx: Path) -> str | None:
    """Parse, then build without keeping the engine."""
    if (why := parse_graph(onnx)) is not None:
        return why
    with tempfile.TemporaryDirectory(prefix="tmc-debug-") as folder:
        try:
            build_engine(onnx, (Profile("static"),), Path(folder) / "x.engine", EngineOptions("tensorrt-rtx", (_CAPABILITY,)))
        except ExportError as error:
            return f"{_NO_BUILD}: {str(error).split(': ', 2)[-1]}"
    return None


def _static(model: Any, profile: Profile) -> Any:
    """Give symbolic dimensions the numbers of a profile, so that every model cut out has static inputs."""
    shape_inference = require("onnx.shape_inference", extra="export", purpose="debug a bundle")
    sizes: dict[str, int] = {}
    shapes: Mapping[str, tuple[int, ...]] = dict(profile.shapes)
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            if dim.dim_param:
                sizes[dim.dim_param] = size
    if not sizes:
        return model
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
            elif dim.dim_param:
                dim.ClearField("dim_param")
    del model.graph.value_info[:]
    return shape_inference.infer_shapes(model, data_prop=True)
