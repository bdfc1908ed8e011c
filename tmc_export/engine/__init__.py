"""ONNX -> TensorRT or TensorRT-RTX engines, here or on the device. Importing this room imports neither."""

from __future__ import annotations

from tmc_export.engine._memory import available_bytes
from tmc_export.engine.build import WAITING, Builder, Progress, build_engine, parse_graph, probe
from tmc_export.engine.bundle import EngineRecord, build_engines, engine_file, read_engines
from tmc_export.engine.cache import EngineCache, engine_cache
from tmc_export.engine.on_device import DeviceTarget, write_on_device_script
from tmc_export.engine.options import EngineOptions, EngineReport, LayerInfo, Profile, Subgraph
from tmc_export.engine.profiles import read_profiles

__all__ = [
    "WAITING",
    "Builder",
    "DeviceTarget",
    "EngineCache",
    "EngineOptions",
    "EngineRecord",
    "EngineReport",
    "LayerInfo",
    "Profile",
    "Progress",
    "Subgraph",
    "available_bytes",
    "build_engine",
    "build_engines",
    "engine_cache",
    "engine_file",
    "parse_graph",
    "probe",
    "read_engines",
    "read_profiles",
    "write_on_device_script",
]
