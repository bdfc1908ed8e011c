"""onnxruntime's GPU providers, on a stand-in for its sessions: what is asked for; the CPU never does the work in silence. *Not run.*"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tmc_export.core.errors import BundleError, ResourceError, RuntimeInputError
from tmc_export.runtime._backend import PROVIDERS, BackendOptions
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend, _Step

ALL = [*PROVIDERS.values()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], str]]:
    """Files with the providers asked for and whether the CPU is forbidden; every session has what it was asked for, and the CPU."""
    found: list[tuple[str, list[str], str]] = []

    def session(path: str, options: ort.SessionOptions, providers: list[str]) -> SimpleNamespace:
        try:
            alone = options.get_session_config_entry("session.disable_cpu_ep_fallback")
        except RuntimeError:  # onnxruntime has no entry of that name
            alone = ""
        found.append((Path(path).name, providers, alone))
        return SimpleNamespace(get_inputs=list, get_outputs=list, get_providers=lambda: [*providers, PROVIDERS["cpu"]])

    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ALL)
    return found


@pytest.mark.parametrize(
    ("provider", "names"),
    [("cuda", ["CUDAExecutionProvider"]), ("tensorrt", ["TensorrtExecutionProvider", "CUDAExecutionProvider"])],
)
def test_a_provider_gets_whole_graphs_and_the_token_table_stays(tmp_path: Path, asked: list[Any], provider: str, names: list[str]) -> None:
    backend = OnnxRuntimeBackend(tmp_path, BackendOptions(provider=provider, host=frozenset({"embed.onnx"})))
    backend.graph("block.onnx")
    backend.graph("embed.onnx")
    assert asked == [("block.onnx", names, "1"), ("embed.onnx", ["CPUExecutionProvider"], "")]


def test_the_cpu_is_asked_for_as_before(tmp_path: Path, asked: list[Any]) -> None:
    OnnxRuntimeBackend(tmp_path, BackendOptions()).graph("block.onnx")
    assert asked == [("block.onnx", ["CPUExecutionProvider"], "")]


class Copying:
    """A session and its binding in one: `y = x + 1`; inputs are copied when they are bound, as onnxruntime does for a GPU."""

    def __init__(self, providers: list[str]) -> None:
        self.providers, self.bound, self.out = providers, np.zeros(1), ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))

    def get_providers(self) -> list[str]:
        return self.providers

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="x", type="tensor(float)", shape=[1])]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="y", type="tensor(float)", shape=[1])]

    def io_binding(self) -> Copying:
        return self

    def bind_ortvalue_input(self, _: str, value: ort.OrtValue) -> None:
        self.bound = value.numpy().copy()

    def bind_ortvalue_output(self, _: str, value: ort.OrtValue) -> None:
        self.out = value

    def run_with_iobinding(self, _: object) -> None:
        self.out.update_inplace(self.bound + np.float32(1))


def test_on_a_gpu_a_step_reads_what_its_arrays_hold_now() -> None:
    """The same array with another number; on the CPU, where nothing is copied, it is bound once."""
    for providers, second in (([PROVIDERS["cuda"], PROVIDERS["cpu"]], 6.0), ([PROVIDERS["cpu"]], 2.0)):
        x = np.ones(1, np.float32)
        step = _Step(Copying(providers), {}, ["y"])  # type: ignore[arg-type]
        step.run([x])
        assert step.given.arrays["y"].tolist() == [2.0]
        x[:] = 5
        step.run([x])
        assert step.given.arrays["y"].tolist() == [second]


def test_a_provider_that_onnxruntime_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeInputError, match=r"has no TensorrtExecutionProvider \(it has CPUExecutionProvider\); install .* or use"):
        OnnxRuntimeBackend(tmp_path, BackendOptions(provider="tensorrt"))


def test_an_unknown_provider() -> None:
    with pytest.raises(RuntimeInputError, match="unknown provider 'cudda'.*did you mean 'cuda'"):
        BackendOptions(provider="cudda")


def test_a_provider_that_does_not_start_is_not_replaced_in_silence(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime logs a line and makes the session with the CPU alone."""
    alone = SimpleNamespace(get_inputs=list, get_outputs=list, get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: alone)
    backend = OnnxRuntimeBackend(tmp_path, BackendOptions(provider="cuda", host=frozenset({"embed.onnx"})))
    with pytest.raises(ResourceError, match=r"CUDAExecutionProvider does not start here \(onnxruntime would use CPUExecutionProvider\)"):
        backend.graph("block.onnx")
    backend.graph("embed.onnx")


def test_a_graph_that_the_provider_cannot_run_whole(tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(
            "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been disabled"
        )

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(BundleError, match=r"fallback to CPU EP has been disabled.*must run all of a graph .*use --provider cpu"):
        OnnxRuntimeBackend(tmp_path, BackendOptions(provider="cuda")).graph("block.onnx")
