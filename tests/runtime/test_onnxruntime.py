"""Graphs on onnxruntime: what goes wrong while they run is one of our errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tmc_export.core.errors import BundleError, ResourceError
from tmc_export.runtime._backend import BackendOptions, options_for
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend


@pytest.fixture
def backend(tmp_path: Path) -> OnnxRuntimeBackend:
    """One graph, `y = table[x]`, whose table has three rows."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    inputs = [helper.make_tensor_value_info("x", TensorProto.INT64, [2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])]
    graph = helper.make_graph([helper.make_node("Gather", ["table", "x"], ["y"])], "g", inputs, outputs, [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    return OnnxRuntimeBackend(tmp_path, BackendOptions(threads=1))


def test_a_graph_runs_and_ignores_what_it_does_not_take(backend: OnnxRuntimeBackend) -> None:
    out = backend.graph("g.onnx").run({"x": np.array([2, 0]), "other": np.zeros(1)})
    assert out["y"].tolist() == [3.0, 1.0] and backend.graph("g.onnx") is backend.graph("g.onnx")


@pytest.mark.parametrize("feed", [np.array([7, 0]), np.array([0, 1, 2]), np.zeros(2, np.float32)], ids=["value", "shape", "dtype"])
def test_what_onnxruntime_refuses_while_it_runs_names_the_file(backend: OnnxRuntimeBackend, feed: np.ndarray) -> None:
    with pytest.raises(BundleError, match=r"failed in g\.onnx: .*; verify the bundle"):
        backend.graph("g.onnx").run({"x": feed})


def test_memory_that_runs_out_is_a_resource_error(backend: OnnxRuntimeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def run(self, *_: object) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 17179869184")

    graph = backend.graph("g.onnx")
    monkeypatch.setattr(graph, "_session", Full())
    with pytest.raises(ResourceError, match="not enough memory to run g.onnx"):
        graph.run({"x": np.array([0, 1])})


def test_a_file_outside_of_the_bundle_is_refused(backend: OnnxRuntimeBackend) -> None:
    with pytest.raises(BundleError, match="leaves the bundle"):
        backend.graph("../g.onnx")


def test_a_damaged_file_is_a_bundle_error(backend: OnnxRuntimeBackend, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="cannot load"):
        backend.graph("bad.onnx")


def test_only_the_decode_graph_of_a_single_block_waits_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}

    def session(path: str, options: ort.SessionOptions, **_: object) -> SimpleNamespace:
        try:
            asked[Path(path).name] = options.get_session_config_entry("session.force_spinning_stop") != "1"
        except RuntimeError:  # onnxruntime has no entry of that name
            asked[Path(path).name] = True
        return SimpleNamespace(get_inputs=list, get_outputs=list)

    monkeypatch.setattr(ort, "InferenceSession", session)
    phases = {name: SimpleNamespace(file=f"{name}.onnx") for name in ("prefill", "chunk", "decode")}
    for blocks, awake in ((1, {"decode.onnx"}), (2, set())):
        program: Any = SimpleNamespace(blocks=[SimpleNamespace(phases=phases)] * blocks, memory_tight=False, embed={})
        backend = OnnxRuntimeBackend(tmp_path, options_for(program))
        asked.clear()
        for name in (*phases, "embed_decode"):
            (tmp_path / f"{name}.onnx").touch()
            backend.graph(f"{name}.onnx")
        assert {name for name, spins in asked.items() if spins} == awake and len(asked) == 4
