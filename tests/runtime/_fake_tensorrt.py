"""TensorRT made of onnxruntime: an engine file names the ONNX graph that it was made of, and a context runs it on the fake device's memory.

What the module has is what the runtime may use: the names are those of `tensorrt_rtx` 1.7 and of `tensorrt` 10.3 to 11.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.runtime._fake_cuda import Call, FakeDriver, Fault, Work
from tmc_export.engine._proto import with_plain_locations
from tmc_export.engine.bundle import EngineRecord, engine_file, file_sha256
from tmc_export.engine.profiles import read_profiles
from tmc_export.runtime._fp8 import FP8, run

SCRATCH = 1000
"""Bytes of working memory per profile, times its number plus one."""

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(int8)": np.int8,
    FP8: "FP8",
}


@cache
def session(path: Path) -> ort.InferenceSession:
    """One session per file, shared by everybody, so that equal inputs give equal bits."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.parent / "onnx"))
    return ort.InferenceSession(with_plain_locations(path.read_bytes()), options, providers=["CPUExecutionProvider"])


def compute(path: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph of a bundle."""
    made = session(path)
    names = [o.name for o in made.get_outputs()]
    return run(made, names, {i.name: feed[i.name] for i in made.get_inputs()})


def place_engines(
    bundle: Path, flavour: str = "tensorrt-rtx", version: str = "1.7.1.116", capabilities: Sequence[str] = ("SM89",)
) -> list[Path]:
    """Write an engine file for every subgraph, and `engines.json`, as the builder does."""
    records, files = [], []
    for graph in read_profiles(bundle):
        path = bundle / engine_file(graph.name, flavour)
        profiles = [{"name": p.name, "shapes": {n: list(s) for n, s in p.shapes}} for p in graph.profiles]
        path.write_text(json.dumps({"onnx": str(bundle / graph.onnx), "profiles": profiles}))
        names = tuple(p.name for p in graph.profiles)
        file = path.relative_to(bundle).as_posix()
        size, digest = path.stat().st_size, file_sha256(path)
        records.append(EngineRecord(graph.name, flavour, version, tuple(capabilities), file, size, digest, "key", names))
        files.append(path)
    (bundle / "engines/engines.json").write_text(json.dumps({"schema": 1, "engines": [asdict(r) for r in records]}))
    return files


def _nptype(dtype: Any) -> Any:
    if dtype == "FP8":
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return dtype


def _held(dtype: Any) -> np.dtype[Any]:
    """What lies in memory: fp8 codes are bytes."""
    return np.dtype(np.uint8 if dtype == "FP8" else dtype)


def make_tensorrt(driver: FakeDriver, version: str = "1.7.1.116", rtx: bool = True) -> Any:
    """The module."""
    made = SimpleNamespace(
        __version__=version,
        ILogger=type(
            "ILogger", (), {"__init__": lambda self: None, "INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
        ),
        TensorIOMode=SimpleNamespace(NONE=0, INPUT=1, OUTPUT=2),
        TensorLocation=SimpleNamespace(DEVICE=0, HOST=1),
        ExecutionContextAllocationStrategy=SimpleNamespace(STATIC=0, ON_PROFILE_CHANGE=1, USER_MANAGED=2),
        DataType=SimpleNamespace(FP8="FP8"),
        nptype=_nptype,
        Runtime=lambda logger: FakeRuntime(driver, logger, rtx),
    )
    if rtx:
        made.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY=0, EAGER=1, NONE=2)
    return made


class FakeRuntime:
    def __init__(self, driver: FakeDriver, logger: Any, rtx: bool) -> None:
        self.driver, self.logger, self.rtx = driver, logger, rtx

    def deserialize_cuda_engine(self, data: Any) -> FakeEngine | None:
        read = bytes(memoryview(data))
        self.driver.calls.append(Call("deserialize", (len(read),)))
        try:
            fields = json.loads(read)
        except ValueError:
            self.logger.log(1, "Error Code 1: Serialization (magicTag mismatch\n in deserialize)")
            return None
        if "says" in fields:
            self.logger.log(1, fields["says"])
            return None
        return FakeEngine(self.driver, self.rtx, Path(fields["onnx"]), [p["shapes"] for p in fields["profiles"]])


class FakeEngine:
    def __init__(self, driver: FakeDriver, rtx: bool, path: Path, profiles: list[dict[str, list[int]]]) -> None:
        self.driver, self.rtx, self.path, self.profiles = driver, rtx, path, profiles
        made = session(path)
        self.inputs = {i.name: i for i in made.get_inputs()}
        self.outputs = {o.name: o for o in made.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> int:
        return 1 if name in self.inputs else 2

    def get_tensor_shape(self, name: str) -> list[int]:
        return [d if isinstance(d, int) else -1 for d in {**self.inputs, **self.outputs}[name].shape]

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[{**self.inputs, **self.outputs}[name].type]

    def get_tensor_location(self, name: str) -> int:
        return 0

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return [self.profiles[profile][name]] * 3

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH * (profile + 1)

    def create_runtime_config(self) -> FakeConfig:
        assert self.rtx, "tensorrt 10.3 has no runtime configuration"
        return FakeConfig()

    def create_execution_context(self, strategy: int | None = None, runtime_config: FakeConfig | None = None) -> FakeContext:
        if runtime_config is not None:
            assert runtime_config.dynamic_shapes_kernel_specialization_strategy == 1, "kernels would change behind a captured step"
            strategy = runtime_config.strategy
        assert strategy == 2, "a context that takes memory of its own"
        self.driver.calls.append(Call("context", (self.path.stem,)))
        return FakeContext(self)


class FakeConfig:
    dynamic_shapes_kernel_specialization_strategy = 0
    strategy = 0

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.driver = engine, engine.driver
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.fails = False
        if engine.rtx:
            self.is_stream_capturable = lambda stream: True

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return 0 <= profile < len(self.engine.profiles) and stream in self.driver.streams

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return list(shape) == self.engine.profiles[self.profile].get(name)

    def infer_shapes(self) -> list[str]:
        for name in self.engine.inputs:
            if -1 not in (own := self.engine.get_tensor_shape(name)):
                self.shapes[name] = tuple(own)
        missing = [name for name in self.engine.inputs if name not in self.shapes]
        if not missing:
            zeros = {n: np.zeros(self.shapes[n], _held(self.engine.get_tensor_dtype(n))) for n in self.engine.inputs}
            self.shapes |= {n: v.shape for n, v in compute(self.engine.path, zeros).items()}
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.driver.calls.append(Call("address", (self.engine.path.stem, self.profile, name, address)))
        if address % 256:
            raise Fault(f"{name} at {address:#x} is not aligned to 256 bytes")
        self.addresses[name] = address
        return name in self.engine.names

    def set_device_memory(self, address: int, size: int) -> None:
        if self.driver.capturing is not None or size < SCRATCH * (self.profile + 1) or address % 256:
            raise Fault(f"working memory of {size} bytes at {address:#x}")
        self.scratch = (address, size)

    def size(self, name: str) -> int:
        return int(np.prod(self.shapes[name])) * _held(self.engine.get_tensor_dtype(name)).itemsize

    def execute_async_v3(self, stream: int) -> bool:
        names = self.engine.names
        if missing := [n for n in names if not self.addresses.get(n)]:
            raise Fault(f"no address for {missing}")
        if self.fails:
            return False
        places = {n: (self.addresses[n], self.size(n)) for n in names}
        outputs = [n for n in names if n in self.engine.outputs]
        for place in (*places.values(), self.scratch):
            self.driver.at(place[0], max(place[1], 1))
        for name in outputs:
            _expect_alone(name, {**places, "the scratch memory": self.scratch})

        def run() -> None:
            def read(name: str) -> np.ndarray:
                raw = self.driver.at(*places[name]) if places[name][1] else np.zeros(0, np.uint8)
                return np.array(raw.view(_held(self.engine.get_tensor_dtype(name))).reshape(self.shapes[name]))

            feed = {n: read(n) for n in self.engine.inputs}
            for name, value in feed.items():
                odd = value.dtype == np.bool_ and value.view(np.uint8).max(initial=0) > 1
                odd = odd or (value.dtype == np.uint8 and bool((value & 0x7F == 0x7F).any()))  # E4M3's NaN
                if odd or not np.isfinite(value.astype(np.float32)).all():
                    raise Fault(f"{self.engine.path.stem}: {name} holds what nobody wrote")
            self.driver.at(*self.scratch)[:] = 0xFF
            for name, value in compute(self.engine.path, feed).items():
                self.driver.at(*places[name])[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

        reads = tuple(p for n, p in places.items() if n not in outputs)
        work = Work("execute", run, reads, (*(places[n] for n in outputs), self.scratch))
        self.driver.push(work, stream, self.engine.path.stem, self.profile, tuple(sorted(self.addresses.items())), self.scratch)
        return True


def _expect_alone(name: str, places: Mapping[str, tuple[int, int]]) -> None:
    """An output shares its memory with nobody."""
    start, size = places[name]
    for other, (at, length) in places.items():
        if other != name and at < start + size and start < at + length:
            raise Fault(f"{name} and {other} share memory")
