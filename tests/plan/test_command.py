"""`tmc-export plan`: text, JSON, other devices, exit codes, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.plan.conftest import DATA
from tmc_export.cli import main

RECIPE = "llava-1.5-7b-fastv-int4"
MODEL = f"model.source={DATA}"


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["plan", *args])
    assert result.exit_code == code, result.output
    return result.output


def test_text() -> None:
    text = run(RECIPE, "--set", MODEL)
    for part in (
        "NVIDIA Jetson AGX Orin 64GB (jetson-agx-orin-64gb), runtime tensorrt, float16",
        "estimate: roofline lower bound (efficiency 1.0); ~ uses unverified figures of the device",
        "unverified figures of the device: tflops.fp16, memory_bandwidth_gb_s",
        "compression at decoder.2 (entry 1) could win",
        "note: int4 on TensorRT 10.3: not run; the fallback is float16 weights",
    ):
        assert part in text
    rows = {line.strip().split("  ")[0]: line.split()[-2:] for line in text.splitlines()}
    assert rows["decoder.2"] == ["144", "72"] and rows["projector"] == ["576", "144"]
    assert rows["graph launches per token"] == ["3", "2"]
    assert rows["compress_1"][-2:] == ["0.0043", "-"], "one row of 4096 channels against 144 + 128 + 256 slots"
    assert rows["operations, prefill"] == ["2,670.8", "9,378.1"]


def test_json() -> None:
    found = json.loads(run(RECIPE, "--set", MODEL, "--json"))
    assert found["schema"] == 1 and found["device"] == "jetson-agx-orin-64gb"
    assert found["plan"]["cuts"][0]["stages"][0]["config"] == {"keep": "50%"}
    assert found["estimate"]["label"].startswith("estimate: ")
    assert found["estimate"]["uncompressed"]["kv_bytes"] == [503316480]
    assert found["estimate"]["speedup"]["first_token"] == pytest.approx(
        found["estimate"]["uncompressed"]["first_token_s"] / found["estimate"]["first_token_s"]
    )
    assert found["memory"]["build"][-1]["name"] == "block_1" and found["memory"]["built_on_device"] is True


def test_another_device_brings_its_runtime() -> None:
    found = json.loads(run(RECIPE, "--set", MODEL, "--json", "--device", "rtx-4090"))
    assert (found["device"], found["runtime"], found["memory"]["built_on_device"]) == ("rtx-4090", "tensorrt-rtx", False)
    found = json.loads(run(RECIPE, "--set", MODEL, "--json", "--device", "cpu"))
    assert (found["runtime"], found["estimate"]["first_token_s"], found["memory"]["device"]) == ("onnxruntime", None, None)
    found = json.loads(run(RECIPE, "--set", MODEL, "--json", "--device", "jetson-orin-nano-8gb", "--set", "target.decode_width=2"))
    assert found["splits"] == [17]


def test_a_device_file_is_sought_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    text = (repository / "devices" / "rtx-4090.yaml").read_text("utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace("name: rtx-4090", "name: mine"), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert json.loads(run(RECIPE, "--set", MODEL, "--json", "--device", "mine.yaml"))["device"] == "mine"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--set", MODEL, "--device", "jetson-orin-nano-8gb", "--set", "target.decode_width=1"), 3, "running needs about 8.0 GiB"),
        (("--set", MODEL, "--set", "compress.1.at=decoder.40"), 3, "method 'fastv' at decoder.40"),
        (("--set", MODEL, "--set", "compress.1.method=fastvv"), 2, "--set compress.1.method=fastvv: "),
        (("--set", MODEL, "--device", "rtx-4009"), 2, "did you mean 'rtx-4090'"),
        (("--set", "model.source=./nowhere"), 2, "does not exist"),
    ],
)
def test_one_clear_line(args: tuple[str, ...], code: int, says: str) -> None:
    text = run(RECIPE, *args, code=code)
    assert text.startswith("error: ") and says in text and text.count("\n") == 1


def test_no_torch() -> None:
    """Neither the verb nor what it prints brings in a heavy package."""
    script = (
        "import sys\nfrom tmc_export.cli import main\n"
        "try:\n    main(['plan', 'quickstart'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fastv" in done.stdout
