"""A bundle whose slots hold fp8 codes that no longer stand for what they did: the node is found, and polygraphy alone shows it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("polygraphy")

from tests._tiny import save_tiny_model, tmc  # noqa: E402
from tests.quantize._slots import build_coded, kv, peaks, recipe  # noqa: E402

CHUNK, PAST = "onnx/block_0_chunk.onnx", "past_key_values.0.key"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    save_tiny_model(folder / "model")
    scales = peaks(folder / "model", recipe(folder, "peaks", quantize="{}"), "fp8")
    return build_coded(recipe(folder, "good", quantize=kv("fp8")), folder / "good", scales, record=True)


def test_nothing_is_found_in_a_good_one(good: Path) -> None:
    ran = tmc("debug", good)
    assert ran.code == 0 and "nothing fails" in ran.out, ran.err


def test_slots_that_are_widened_by_another_scale(good: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    graph = onnx.load(bad / CHUNK, load_external_data=False)
    (node,) = (n for n in graph.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == PAST)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.full(2, 0.5, np.float32), "wrong"))
    node.input[1] = "wrong"
    onnx.save(graph, bad / CHUNK)
    ran = tmc("debug", bad, "--against", good, "-o", tmp_path / "found")
    assert ran.code == 4 and f"DequantizeLinear '{node.name}' is at fault" in ran.error(), ran.err
    told = json.loads((tmp_path / "found" / "fault.json").read_text("utf-8"))
    assert told["reproduce"] in ran.out and "--load-inputs" not in told["reproduce"]  # the codes are in the model
    reduced = onnx.load(tmp_path / "found" / "model.onnx")
    assert [n.op_type for n in reduced.graph.node] == ["DequantizeLinear"] and not reduced.graph.input
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = subprocess.run(told["reproduce"].split(), capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert shown.returncode == 1 and "Passed: 0/1" in shown.stdout + shown.stderr, shown.stdout[-2000:]
