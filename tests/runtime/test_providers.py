"""onnxruntime's GPU providers, on a stand-in for its sessions: what is asked for; the CPU never does the work in silence. *Not run.*"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest

from tmc_export.core.errors import BundleError, ResourceError, RuntimeInputError
from tmc_export.runtime._backend import PROVIDERS, BackendOptions
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend

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
