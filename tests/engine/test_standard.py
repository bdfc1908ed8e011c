"""Standard TensorRT cannot be installed here: a recording stand-in checks what is called, in which order. Nothing was run on a Jetson."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tmc_export.core.errors import LegalityError, MissingExtraError, ResourceError
from tmc_export.engine import EngineOptions, build_engine
from tmc_export.engine._build import _writer
from tmc_export.engine._wire import profiles_from

FAKE = """
import json
__version__ = "@VERSION@"
CALLS = @CALLS@
def say(*words):
    with open(CALLS, "a") as file:
        file.write(json.dumps(words) + "\\n")
class NetworkDefinitionCreationFlag: STRONGLY_TYPED = 1
class ProfilingVerbosity: DETAILED = "detailed"
class MemoryPoolType: WORKSPACE = "workspace"
class Dims(list): pass
class ILogger:
    INFO, WARNING, ERROR, INTERNAL_ERROR, VERBOSE = range(5)
class IProgressMonitor: pass
class IStreamWriter: pass
class Tensor:
    name, shape = "hidden", (1, -1, 8)
class Network:
    num_inputs = 1
    def get_input(self, index): return Tensor()
class OnnxParser:
    def __init__(self, network, logger): pass
    def parse_from_file(self, path):
        say("parse"); return True
class Cache:
    def serialize(self): return b"timings"
class Profile:
    def set_shape(self, *words): say("shape", *words)
class Config:
    def __setattr__(self, name, value): say("set", name, value if isinstance(value, (int, str)) else None); self.__dict__[name] = value
    def set_memory_pool_limit(self, *words): say("pool", *words)
    def create_timing_cache(self, data): say("cache", len(data)); return Cache()
    def set_timing_cache(self, cache, mismatch): say("use cache"); return "@CACHE@" == "taken"
    def get_timing_cache(self): return Cache()
    def add_optimization_profile(self, profile): say("profile"); return 0
class Builder:
    def __init__(self, logger): self.logger = logger
    def create_network(self, flags): say("network", flags); return Network()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        say("build"); self.logger.log(ILogger.INFO, "Total Activation Memory: 77 bytes")
        self.logger.log(ILogger.VERBOSE, "Layers:\\nName: _gemm_mha_v2_1, LayerType: kgen, Inputs: []")
        return b"plan"
    if "@STREAM@":
        def build_serialized_network_to_stream(self, network, config, writer):
            say("stream"); return writer.write(b"streamed") == 8
"""


def place(fake_module, tmp_path: Path, version: str, stream: bool, cache: str = "taken") -> Path:
    calls = tmp_path / "calls"
    source = (
        FAKE.replace("@CACHE@", cache)
        .replace("@VERSION@", version)
        .replace("@CALLS@", repr(str(calls)))
        .replace("@STREAM@", "1" if stream else "")
    )
    fake_module("tensorrt", source)
    return calls


def build(tmp_path: Path, graphs):
    block = graphs[0](tmp_path / "block_0.onnx", width=8)
    profiles = profiles_from([{"name": name, "shapes": {"hidden": [1, size, 8]}} for name, size in (("prefill", 4), ("decode", 2))])
    options = EngineOptions(flavour="tensorrt", capabilities=(), workspace_mib=64, timing_cache=tmp_path / "timing.cache")
    return build_engine(block.path, profiles, tmp_path / "block_0.engine", options)


@pytest.mark.parametrize(
    ("version", "flags", "stream"), [("10.3.0", 2, False), ("10.13.3", 2, True), ("10.16.1", 2, True), ("11.1.0", 0, True)]
)
def test_calls(tmp_path: Path, graphs, fake_module, version: str, flags: int, stream: bool) -> None:
    calls = place(fake_module, tmp_path, version, stream)
    report = build(tmp_path, graphs)
    done = [json.loads(line) for line in calls.read_text().splitlines()]
    assert done == [
        ["network", flags],
        ["parse"],
        ["set", "builder_optimization_level", 3],
        ["set", "profiling_verbosity", "detailed"],
        ["pool", "workspace", 64 * 2**20],
        ["cache", 0],
        ["use cache"],
        ["set", "progress_monitor", None],
        ["shape", "hidden", [1, 4, 8], [1, 4, 8], [1, 4, 8]],
        ["profile"],
        ["shape", "hidden", [1, 2, 8], [1, 2, 8], [1, 2, 8]],
        ["profile"],
        ["stream" if stream else "build"],
    ]
    assert report.path.read_bytes() == (b"streamed" if stream else b"plan")
    assert (report.version, report.flavour) == (version, "tensorrt")
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"
    if not stream:
        assert report.activation_bytes == (77,) and report.multi_head_attention == 1


def test_a_timing_cache_that_is_refused_is_said(tmp_path: Path, graphs, fake_module) -> None:
    place(fake_module, tmp_path, "10.13.3", True)
    assert build(tmp_path, graphs).warnings == ()
    place(fake_module, tmp_path, "10.13.3", True, cache="refused")
    (warning,) = build(tmp_path, graphs).warnings
    assert "timing.cache is of another GPU or TensorRT; kernels are timed anew" in warning


def test_an_operator_this_parser_lacks_is_refused_before_the_build(tmp_path: Path, graphs, fake_module) -> None:
    calls = place(fake_module, tmp_path, "10.3.0", False)
    graphs[2](tmp_path / "g.onnx", "RMSNormalization")
    options, profiles = EngineOptions(flavour="tensorrt"), profiles_from([{"name": "static", "shapes": {}}])
    with pytest.raises(LegalityError, match="has no RMSNormalization"):
        build_engine(tmp_path / "g.onnx", profiles, tmp_path / "g.engine", options)
    assert not calls.exists()


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, graphs, fake_module) -> None:
    place(fake_module, tmp_path, "10.3.0", False)
    path = tmp_path / "fakes/tensorrt.py"
    path.write_text(path.read_text().replace('return b"plan"', "import errno, os; raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"))
    with pytest.raises(ResourceError, match="No space left on device"):
        build(tmp_path, graphs)
    assert not list(tmp_path.glob("*.engine")) and not list(tmp_path.glob(".*partial"))


def test_a_full_disk_while_streaming_stops_the_builder() -> None:
    failed: list[OSError] = []
    with Path("/dev/full").open("wb", buffering=0) as file:
        writer = _writer(SimpleNamespace(IStreamWriter=_Base), file, failed)
        assert writer.write(b"engine") == 0  # fewer bytes than given: the builder gives up
    assert failed[0].errno == errno.ENOSPC


class _Base:
    pass


def test_a_missing_tensorrt_names_jetpack(tmp_path: Path, graphs, fake_module) -> None:
    fake_module("tensorrt", "raise ImportError('no such package')")
    with pytest.raises(MissingExtraError, match="JetPack brings it"):
        build(tmp_path, graphs)
