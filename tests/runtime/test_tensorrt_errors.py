"""What a machine or a bundle lacks for running engines is one line that says what to do; and the names we use are the real packages'."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.runtime._device import device, edit_records
from tests.runtime._fake_cuda import CUDA_MEMCPY3D, CUresult, FakeDriver
from tests.runtime._fake_tensorrt import FakeContext, FakeEngine, make_tensorrt, place_engines
from tmc_export.core.errors import BundleError, MissingExtraError, ResourceError, RuntimeInputError
from tmc_export.runtime._backend import BackendOptions, open_backend
from tmc_export.runtime._tensorrt import TensorRTBackend

pytestmark = pytest.mark.usefixtures("traced_once")

FILE = "onnx/vision_0.onnx"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """One graph, `y = relu(x)`, and its engine."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    (tmp_path / "onnx").mkdir()
    (tmp_path / "engines").mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / FILE)
    static = [{"name": "static", "shapes": {}}]
    subgraphs = [{"name": "vision_0", "onnx": FILE, "precision": "float32", "profiles": static}]
    (tmp_path / "engines/profiles.json").write_text(json.dumps({"subgraphs": subgraphs}))
    place_engines(tmp_path)
    return tmp_path


REAL_LOGS: dict[str, Any] = {}
"""Of the real package, which crashes when its first logger is gone; apart from those of the made-up one."""


def run(bundle: Path, driver: FakeDriver | None = None, feed: Any = None, **fake: Any) -> Any:
    with device(driver or FakeDriver(), **fake):
        backend = open_backend("tensorrt-rtx", bundle, BackendOptions())
        return backend.graph(FILE).run(feed or {"x": np.arange(-8, 8, dtype=np.float32).reshape(2, 8)})["y"]


def test_a_graph_runs(bundle: Path) -> None:
    assert run(bundle).reshape(-1).tolist() == [0.0] * 8 + [float(n) for n in range(8)]


# ------------------------------------------------------------------------------------------------------- the machine
def test_a_missing_package_names_what_brings_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"'tensorrt_rtx' is missing .*'tmc-export\[rtx\]'"):
        open_backend("tensorrt-rtx", bundle, BackendOptions())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="'tensorrt' is missing; JetPack brings it"):
        open_backend("tensorrt", bundle, BackendOptions())
    driver = FakeDriver()
    for flavour, module, extra in (("tensorrt-rtx", "tensorrt_rtx", "rtx"), ("tensorrt", "tensorrt", "jetson")):
        monkeypatch.setitem(sys.modules, module, make_tensorrt(driver))
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
        with pytest.raises(MissingExtraError, match=rf"'cuda.bindings.driver' is missing .*'tmc-export\[{extra}\]'"):
            open_backend(flavour, bundle, BackendOptions())


def test_no_gpu(bundle: Path) -> None:
    with pytest.raises(ResourceError, match="no GPU to run engines on: .*CUDA_ERROR_NO_DEVICE.*use --backend onnxruntime"):
        run(bundle, FakeDriver(capability=None))


def test_no_driver(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: FakeDriver, flags: int) -> None:
        raise RuntimeError("libcuda.so.1 is not found")

    monkeypatch.setattr(FakeDriver, "cuInit", missing)
    with pytest.raises(ResourceError, match="no GPU to run engines on: libcuda.so.1 is not found"):
        run(bundle)


@pytest.mark.parametrize(("memory", "what"), [(100, "activations: 1024 bytes"), (1400, "inputs of onnx/vision_0.onnx: 256 bytes")])
def test_memory_that_runs_out_says_how_much_was_asked(bundle: Path, memory: int, what: str) -> None:
    driver = FakeDriver(memory=memory - memory % 100 if memory < 1000 else 1024 + 100)
    with pytest.raises(ResourceError, match=rf"not enough device memory for .*{what} asked, 100 of \d+ free"):
        run(bundle, driver)


# -------------------------------------------------------------------------------------------------------- the bundle
AGAIN = "tmc-export engine .* --runtime tensorrt-rtx --capability SM89"


def test_no_engine_was_built(bundle: Path) -> None:
    (bundle / "engines/engines.json").unlink()
    with pytest.raises(BundleError, match=rf"has no tensorrt-rtx engine of vision_0; build it with: {AGAIN}"):
        run(bundle)


def test_an_engine_of_the_other_kind_does_not_count(bundle: Path) -> None:
    place_engines(bundle, "tensorrt", "10.3.0.30", ("SM87",))
    with pytest.raises(BundleError, match="has no tensorrt-rtx engine"):
        run(bundle)


def test_an_engine_of_another_version(bundle: Path) -> None:
    with pytest.raises(BundleError, match=rf"made by tensorrt-rtx 1\.7\.1\.116, this machine has 1\.8\.0\.2; rebuild with: {AGAIN}"):
        run(bundle, version="1.8.0.2")


def test_an_engine_for_another_gpu(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"for SM89, this GPU is SM120; rebuild with: .* --capability SM120"):
        run(bundle, FakeDriver(capability=(12, 0)))


def test_a_missing_a_short_and_a_changed_engine_file(bundle: Path) -> None:
    path = bundle / "engines/vision_0.tensorrt-rtx.engine"
    data = path.read_bytes()
    for change, says in ((data[:-1], "has .* bytes"), (data.replace(b"x", b"y"), "sha256"), (None, "is missing")):
        path.unlink() if change is None else path.write_bytes(change)
        with pytest.raises(BundleError, match=rf"{says}.*; rebuild with: {AGAIN}"):
            run(bundle)


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [(b"plan", BundleError, "Error Code 1: Serialization .magicTag mismatch in deserialize"),
     (b'{"says": "Requested amount of GPU memory could not be allocated"}', ResourceError, r"not enough device memory .*\(65 bytes\)")],
)  # fmt: skip
def test_an_engine_that_tensorrt_does_not_load(bundle: Path, content: bytes, error: type[Exception], says: str) -> None:
    from tmc_export.engine.bundle import file_sha256

    path = bundle / "engines/vision_0.tensorrt-rtx.engine"
    path.write_bytes(content)
    edit_records(bundle, bytes=len(content), sha256=file_sha256(path))
    with pytest.raises(error, match=says):
        run(bundle)


def test_a_profile_that_the_engine_lacks(bundle: Path) -> None:
    edit_records(bundle, profiles=["prefill"])
    with pytest.raises(BundleError, match=r"no profile 'static' \(prefill\); rebuild"):
        run(bundle)


def test_a_path_outside_of_the_bundle(bundle: Path) -> None:
    edit_records(bundle, file="../other.engine")
    with pytest.raises(BundleError, match="leaves the bundle"):
        run(bundle)


def test_a_graph_without_engine(bundle: Path) -> None:
    with device(FakeDriver()), pytest.raises(BundleError, match="no engine is made of onnx/block_0_prefill.onnx"):
        open_backend("tensorrt-rtx", bundle, BackendOptions()).graph("onnx/block_0_prefill.onnx")


@pytest.mark.parametrize(
    "feed", [{"x": np.zeros((2, 7), np.float32)}, {"x": np.zeros((2, 8), np.float64)}, {"x": np.zeros((1, 8), np.float32)}], ids=str
)
def test_an_input_of_another_shape_or_type(bundle: Path, feed: dict[str, np.ndarray]) -> None:
    with pytest.raises(BundleError, match=r"vision_0.onnx takes x \[2, 8\] of float32, not .*rebuild the engines"):
        run(bundle, feed=feed)


def test_tensorrt_that_fails_while_it_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeContext, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(BundleError, match="TensorRT 1.7.1.116 does not run in onnx/vision_0.onnx: it gives no reason"):
        run(bundle)


def test_an_output_that_the_engine_lacks(bundle: Path) -> None:
    with device(FakeDriver()), pytest.raises(BundleError, match="has no output z"):
        open_backend("tensorrt-rtx", bundle, BackendOptions()).graph(FILE).relay({"x": np.zeros((2, 8), np.float32)}, ("z",))


def test_a_graph_outlives_its_backend_and_the_device_gets_its_memory_back(bundle: Path) -> None:
    driver = FakeDriver()
    with device(driver):
        graph = open_backend("tensorrt-rtx", bundle, BackendOptions()).graph(FILE)
    gc.collect()
    assert graph.run({"x": np.ones((2, 8), np.float32)})["y"].all()
    assert driver.streams
    del graph
    gc.collect()
    assert not driver.streams and all(a.freed for a in (*driver.allocations, *driver.pinned))


def test_a_provider_is_onnxruntimes(bundle: Path) -> None:
    with pytest.raises(RuntimeInputError, match="provider 'cuda' is onnxruntime's, the backend is 'tensorrt-rtx'"):
        open_backend("tensorrt-rtx", bundle, BackendOptions(provider="cuda"))


# ---------------------------------------------------------------------------------------------------- the real packages
def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_made_up_tensorrt_has_no_name_that_the_real_one_lacks() -> None:
    real = pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    made = make_tensorrt(FakeDriver())
    for name, value in vars(made).items():
        assert hasattr(real, name), name
        for member in vars(value) if type(value).__name__ == "SimpleNamespace" else ():
            assert hasattr(getattr(real, name), member), f"{name}.{member}"
    ours = {"driver", "rtx", "path", "profiles", "inputs", "outputs", "names", "size"}
    for mine, theirs in ((FakeEngine, real.ICudaEngine), (FakeContext, real.IExecutionContext)):
        assert not {n for n in public(mine) - ours if not hasattr(theirs, n)}
    for name in ("num_io_tensors", "num_optimization_profiles"):
        assert hasattr(real.ICudaEngine, name)
    for name in ("dynamic_shapes_kernel_specialization_strategy", "set_execution_context_allocation_strategy"):
        assert hasattr(real.IRuntimeConfig, name)
    assert hasattr(real.IExecutionContext, "is_stream_capturable") and hasattr(real.Runtime, "deserialize_cuda_engine")
    assert [np.dtype(real.nptype(getattr(real, n))) for n in ("float32", "float16", "int64", "bool")] == [
        np.dtype(n) for n in ("float32", "float16", "int64", "bool")
    ]


def test_the_real_tensorrt_refuses_an_engine_that_is_none(bundle: Path) -> None:
    """What the real package does on a machine without a GPU: it starts, takes a mapped file and our logger, and refuses."""
    real = pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    from tmc_export.engine.bundle import file_sha256

    path = bundle / "engines/vision_0.tensorrt-rtx.engine"
    path.write_bytes(b"no engine" * 100)
    edit_records(bundle, bytes=900, sha256=file_sha256(path), version=real.__version__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tmc_export.runtime._tensorrt._LOGS", REAL_LOGS)
        patch.setitem(sys.modules, "cuda.bindings.driver", FakeDriver())
        with pytest.raises(BundleError, match="TensorRT cannot load vision_0.tensorrt-rtx.engine: .*magicTag.*; rebuild with: "):
            open_backend("tensorrt-rtx", bundle, BackendOptions()).graph(FILE)


def test_tensorrt_that_does_not_start(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(logger: Any) -> None:
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    driver = FakeDriver()
    with device(driver):
        monkeypatch.setattr(sys.modules["tensorrt_rtx"], "Runtime", nothing)
        with pytest.raises(ResourceError, match=r"tensorrt-rtx 1\.7\.1\.116 does not start: CUDA initialization failure with error: 35"):
            open_backend("tensorrt-rtx", bundle, BackendOptions())


def test_the_made_up_driver_has_no_name_that_the_real_one_lacks() -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="needs the extra [rtx]")
    functions = {n for n in public(FakeDriver) if n.startswith("cu")}
    assert len(functions) > 20 and all(hasattr(real, n) for n in functions)
    for code in CUresult:
        assert int(getattr(real.CUresult, code.name)) == code
    made = real.CUDA_MEMCPY3D()
    for name in vars(CUDA_MEMCPY3D()):
        assert name in dir(made), name
    made.srcDevice, made.srcPitch, made.Depth = 4096, 64, 3
    made.srcMemoryType = real.CUmemorytype.CU_MEMORYTYPE_DEVICE
    assert (int(made.srcDevice), made.srcPitch, made.Depth) == (4096, 64, 3)
    assert int(real.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1 and int(real.CUmemorytype.CU_MEMORYTYPE_DEVICE) == 2
    assert hasattr(real.CUstreamCaptureMode, "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")
    assert real.cuMemcpyHtoDAsync.__doc__.startswith("cuMemcpyHtoDAsync(dstDevice, srcHost, size_t ByteCount, hStream)")
    assert real.cuMemcpy3DAsync.__doc__.startswith("cuMemcpy3DAsync(CUDA_MEMCPY3D pCopy: Optional[CUDA_MEMCPY3D], hStream)")


def test_the_real_driver_without_a_gpu(bundle: Path) -> None:
    """The one call of the real bindings that a machine without a GPU can make."""
    pytest.importorskip("cuda.bindings.driver", reason="needs the extra [rtx]")
    from tmc_export.engine._device import cuda_device

    if cuda_device() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt_rtx", make_tensorrt(FakeDriver()))
        with pytest.raises(ResourceError, match="no GPU to run engines on"):
            TensorRTBackend(bundle, BackendOptions(), "tensorrt-rtx")
