"""Writes build_on_device.sh: what a board needs to build a bundle's engines with nothing but JetPack."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from tmc_export.core.errors import ExportError
from tmc_export.core.files import write_whole
from tmc_export.engine._memory import estimate_bytes
from tmc_export.engine._proto import GraphFacts, read_graph, with_plain_locations
from tmc_export.engine._script import FOOT, HEAD
from tmc_export.engine._versions import check_graph, version_for
from tmc_export.engine.build import weight_files
from tmc_export.engine.bundle import subgraph_key
from tmc_export.engine.options import EngineOptions, Profile, Subgraph
from tmc_export.engine.profiles import read_profiles

__all__ = ["SCRIPT", "DeviceTarget", "trtexec_arguments", "write_on_device_script"]

SCRIPT = "build_on_device.sh"


@dataclass(frozen=True)
class DeviceTarget:
    """The device a script is for.

    Attributes:
        name: as in `devices/`, e.g. `"jetson-agx-orin-64gb"`.
        tensorrt: TensorRT version expected there, `"10.3"`; the script asks trtexec for the true one.
        workspace_mib: scratch memory for the builder.
        builder_optimization_level: 0 to 5.
    """

    name: str
    tensorrt: str
    workspace_mib: int = 2048
    builder_optimization_level: int = 3


@dataclass(frozen=True)
class _Cost:
    memory: int
    disk: int


def _shape_list(profile: Profile, facts: GraphFacts, name: str) -> str:
    shapes = dict(profile.shapes)
    parts = []
    for item in facts.inputs:
        if item.static:
            continue  # trtexec takes shapes for dynamic inputs only
        if item.name not in shapes:
            raise ExportError(f"{name}, profile '{profile.name}': no shape for the dynamic input {item.name}; build the bundle again")
        if any(mark in item.name for mark in ":,' \t"):
            raise ExportError(f"{name}: trtexec takes no shape for an input named '{item.name}'; rename it without ':', ',' or quotes")
        parts.append(f"{item.name}:{'x'.join(map(str, shapes[item.name]))}")
    return ",".join(parts)


def trtexec_arguments(subgraph: Subgraph, facts: GraphFacts) -> tuple[str, ...]:
    """Return the shape options of trtexec for a subgraph: none for a static one, one `--profile=N` group per profile.

    Raises:
        ExportError: a profile names no shape for a dynamic input, or an input's name cannot be written for trtexec.
    """
    lists = [_shape_list(profile, facts, subgraph.name) for profile in subgraph.profiles]
    if not any(lists):
        return ()
    made: list[str] = []
    for index, shapes in enumerate(lists):
        made += [f"--profile={index}", f"--minShapes={shapes}", f"--optShapes={shapes}", f"--maxShapes={shapes}"]
    return tuple(made)


def _localise(onnx: Path, facts: GraphFacts) -> None:
    """Name the weight files without their folder, in place, because trtexec refuses `../`."""
    if any(Path(location).name != location for location in facts.locations):
        write_whole(onnx, with_plain_locations(onnx.read_bytes()))


def _call(bundle: Path, subgraph: Subgraph, facts: GraphFacts, options: EngineOptions, cost: _Cost) -> str:
    graph = bundle / subgraph.onnx
    files = [os.path.relpath(path, (bundle / "engines").resolve()) for path in weight_files(graph, facts)]
    linked = " ".join(shlex.quote(file) for file in files) if graph.parent.name == "engines" else ""
    key = subgraph_key(bundle, subgraph, options, None)
    profiles = json.dumps([profile.name for profile in subgraph.profiles])
    fixed = [subgraph.name, key, str(cost.memory // 1024), str(cost.disk // 1024), subgraph.onnx, profiles]
    words = [" ".join(shlex.quote(word) for word in fixed), *(shlex.quote(word) for word in trtexec_arguments(subgraph, facts))]
    call = "build " + " \\\n  ".join(words)
    return f"\nlink_weights {linked}\n{call}\nunlink_weights\n" if linked else f"\n{call}\n"


def _filled(script: str, device: DeviceTarget, costs: dict[str, _Cost]) -> str:
    """Put the device's and the bundle's values into the script's `@NAME@` marks."""
    largest = max(costs, key=lambda name: costs[name].memory)
    level, workspace = device.builder_optimization_level, device.workspace_mib
    trtexec = (
        f"--builderOptimizationLevel={level} --memPoolSize=workspace:{workspace} "
        "--timingCacheFile=engines/timing.cache --profilingVerbosity=detailed"
    )
    values = {
        "DEVICE": device.name,
        "TENSORRT": device.tensorrt,
        "OPTIONS": trtexec,
        "ENGINE_OPTIONS": f"--workspace-mib {workspace} --optimization-level {level}",
        "LARGEST": largest,
        "LARGEST_KIB": str(costs[largest].memory // 1024),
        "DISK_KIB": str(max(cost.disk for cost in costs.values()) // 1024),
        "COUNT": str(len(costs)),
    }
    for name, value in values.items():
        script = script.replace(f"@{name}@", value)
    return script


def write_on_device_script(bundle_dir: Path, device: DeviceTarget) -> tuple[Path, tuple[str, ...]]:
    """Write `BUNDLE/build_on_device.sh`; call it before the manifest hashes the files.

    Graphs of `engines/` whose weights are named `../onnx/x.data` are rewritten to name `x.data`; the script links the weights for the
    time of the build.

    Args:
        bundle_dir: the bundle.
        device: what the script is for.

    Returns:
        The script and what to warn the user of.

    Raises:
        LegalityError: a graph holds an operator the device's TensorRT lacks, or the version is too old.
        ExportError: shapes that cannot be written for trtexec.
        BundleError: a file is missing.
    """
    row = version_for(device.tensorrt)
    options = EngineOptions(
        flavour="tensorrt",
        capabilities=(),
        workspace_mib=device.workspace_mib,
        builder_optimization_level=device.builder_optimization_level,
    )
    warnings: list[str] = []
    calls: list[str] = []
    costs: dict[str, _Cost] = {}
    for subgraph in read_profiles(bundle_dir):
        graph = bundle_dir / subgraph.onnx
        facts = read_graph(graph)
        _localise(graph, facts)
        facts = read_graph(graph)
        warnings += check_graph(subgraph.name, facts, row)
        files = weight_files(graph, facts)
        weights = sum(path.stat().st_size for path in files) + facts.bytes
        copies = 4 if subgraph.precision == "widened" else 2  # a width of 1 may store weights twice, and these doubled
        costs[subgraph.name] = _Cost(estimate_bytes(facts.bytes, files, subgraph.precision), copies * weights + 16 * 2**20)
        calls.append(_call(bundle_dir, subgraph, facts, options, costs[subgraph.name]))
    path = bundle_dir / SCRIPT
    write_whole(path, _filled(HEAD + "".join(calls) + FOOT, device, costs), 0o755)
    return path, tuple(warnings)
