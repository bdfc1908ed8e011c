"""build_on_device.sh, run with a stand-in for trtexec."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tmc_export.core.errors import LegalityError
from tmc_export.engine import DeviceTarget, read_engines, write_on_device_script

ORIN = DeviceTarget("jetson-agx-orin-64gb", "10.3")

TRTEXEC = r"""#!/usr/bin/env bash
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v$FAKE_VERSION] # trtexec $*"
[ "$1" != --help ] || exit 0
echo "[I] Compute Capability: 8.7"
echo "$*" >>"$FAKE_CALLS"
case "$*" in *"$FAKE_FAIL"*) echo "[E] it does not parse"; exit "$FAKE_STATUS" ;; esac
for word in "$@"; do
  case "$word" in
    --onnx=*) graph="${word#--onnx=}" ;;
    --saveEngine=*) engine="${word#--saveEngine=}" ;;
  esac
done
case "$graph" in engines/*) [ -s engines/block_0.data ] || { echo "[E] no weights beside the graph"; exit 1; } ;; esac
[ -z "${FAKE_GO:-}" ] || until [ -e "$FAKE_GO" ]; do sleep 0.05; done
echo "engine of $graph" >"$engine"
"""


class Board:
    """A bundle with its script, and a board whose trtexec is a stand-in."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder, self.calls = bundle, folder, folder / "calls"
        (folder / "bin").mkdir()
        (folder / "bin/trtexec").write_text(TRTEXEC)
        (folder / "bin/trtexec").chmod(0o755)
        self.memory(16 * 2**20)

    def memory(self, kib: int) -> None:
        (self.folder / "meminfo").write_text(f"MemTotal: {2 * kib} kB\nMemAvailable: {kib} kB\n")

    def environment(self, version: str = "100300", fail: str = "never", status: int = 1, **more: str) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "TMC_EXPORT_ONLY_TRTEXEC": "1",
            "TMC_EXPORT_MEMINFO": str(self.folder / "meminfo"),
            "FAKE_VERSION": version,
            "FAKE_CALLS": str(self.calls),
            "FAKE_FAIL": fail,
            "FAKE_STATUS": str(status),
            **more,
        }

    def run(self, **more: Any) -> subprocess.CompletedProcess[str]:
        environment = self.environment(**more)
        return subprocess.run([self.bundle / "build_on_device.sh"], capture_output=True, text=True, env=environment, check=False)

    def start(self, **more: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([self.bundle / "build_on_device.sh"], text=True, env=self.environment(**more), **pipes)

    def lines(self) -> list[str]:
        found = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return found


@pytest.fixture
def board(bundle: Path, tmp_path: Path) -> Board:
    script, warnings = write_on_device_script(bundle, ORIN)
    assert script == bundle / "build_on_device.sh" and warnings == ()
    return Board(bundle, tmp_path)


def test_syntax(board: Board) -> None:
    subprocess.run(["bash", "-n", board.bundle / "build_on_device.sh"], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("bash -n passed; shellcheck is not installed")
    subprocess.run(["shellcheck", board.bundle / "build_on_device.sh"], check=True)


def test_the_lines_given_to_trtexec(board: Board) -> None:
    done = board.run()
    assert done.returncode == 0, done.stderr
    block, vision = board.lines()
    start = "--onnx={} --saveEngine=engines/{}.tensorrt.engine.partial --stronglyTyped --skipInference --builderOptimizationLevel=3 "
    assert block.startswith(start.format("engines/block_0.onnx", "block_0"))
    shapes = [
        "hidden:1x128x256,mask:1x1x128x128,past_k0:1x4x0x64,past_v0:1x4x0x64,past_k1:1x4x0x64,past_v1:1x4x0x64",
        "hidden:1x2x256,mask:1x1x2x258,past_k0:1x4x256x64,past_v0:1x4x256x64,past_k1:1x4x256x64,past_v1:1x4x256x64",
    ]
    assert block.endswith(" ".join(f"--profile={i} --minShapes={s} --optShapes={s} --maxShapes={s}" for i, s in enumerate(shapes)))
    assert vision.startswith(start.format("onnx/vision_0.onnx", "vision_0")) and "Shapes" not in vision and "--profile=" not in vision
    assert "--memPoolSize=workspace:2048" in block
    records = {record.name: record for record in read_engines(board.bundle)}
    assert set(records) == {"block_0", "vision_0"}
    assert records["block_0"].version == "10.3.0" and records["block_0"].capabilities == ("SM87",)
    assert records["block_0"].profiles == ("prefill", "decode")
    assert (board.bundle / records["block_0"].file).read_text() == "engine of engines/block_0.onnx\n"
    assert not [path for path in (board.bundle / "engines").iterdir() if path.is_symlink() or path.name.endswith(".partial")]


def test_tensorrt_11_has_no_other_kind_of_network(board: Board) -> None:
    assert board.run(version="110100").returncode == 0
    lines = board.lines()
    assert len(lines) == 2 and not any("--stronglyTyped" in line for line in lines)


def test_it_goes_on_where_it_stopped(board: Board) -> None:
    failed = board.run(fail="vision_0")
    assert failed.returncode == 3 and "not built: vision_0" in failed.stderr and "it does not parse" in failed.stderr
    assert len(board.lines()) == 2
    assert board.run().returncode == 0
    (line,) = board.lines()
    assert "vision_0" in line
    assert board.run().returncode == 0 and board.lines() == []
    assert {record.name for record in read_engines(board.bundle)} == {"block_0", "vision_0"}
    assert board.run(version="101300").returncode == 0 and len(board.lines()) == 2  # another TensorRT: all again


def test_a_changed_bundle_is_built_again(board: Board, graphs) -> None:
    assert board.run().returncode == 0 and len(board.lines()) == 2
    graphs[2](board.bundle / "onnx/vision_0.onnx", "Sigmoid")
    write_on_device_script(board.bundle, ORIN)
    assert board.run().returncode == 0
    (line,) = board.lines()
    assert "vision_0" in line


def test_too_little_memory_is_refused_before_anything_starts(board: Board) -> None:
    board.memory(100 * 1024)
    done = board.run()
    assert done.returncode == 5 and "100 MiB are free" in done.stderr and board.lines() == []
    assert board.run(TMC_EXPORT_IGNORE_MEMORY="1").returncode == 0 and len(board.lines()) == 2


def test_a_killed_build_is_a_matter_of_memory(board: Board) -> None:
    done = board.run(fail="block_0", status=137)
    assert done.returncode == 5 and "block_0 was killed" in done.stderr


def test_two_at_once(board: Board) -> None:
    """The second waits, and builds nothing."""
    if shutil.which("flock") is None:
        pytest.skip("the script uses flock where it is installed")
    go = board.folder / "go"
    first = board.start(FAKE_GO=str(go))
    while not board.calls.exists():
        assert first.poll() is None
        time.sleep(0.02)
    second = board.start()
    assert second.stdout is not None and "another build is at work here" in second.stdout.readline()
    go.touch()
    assert "all 2 engines" in first.communicate(timeout=60)[0] and first.returncode == 0
    assert "block_0 is built already" in second.communicate(timeout=60)[0] and second.returncode == 0
    assert len(board.lines()) == 2
    assert {record.name for record in read_engines(board.bundle)} == {"block_0", "vision_0"}


def test_missing_weights_and_missing_trtexec(board: Board) -> None:
    (board.folder / "bin/trtexec").rename(board.folder / "trtexec")
    done = board.run()
    assert done.returncode == 2 and "trtexec is missing" in done.stderr
    assert board.run(TMC_EXPORT_TRTEXEC=str(board.folder / "trtexec")).returncode == 0
    (board.bundle / "onnx/block_0.data").unlink()
    done = board.run(TMC_EXPORT_TRTEXEC=str(board.folder / "trtexec"))
    assert done.returncode == 4 and "block_0.data is missing" in done.stderr


def test_an_old_tensorrt_is_refused(board: Board) -> None:
    done = board.run(version="080601")
    assert done.returncode == 3 and "TensorRT 8.6.1 is too old" in done.stderr


def test_an_installed_tmc_export_is_preferred(board: Board) -> None:
    tool = board.folder / "bin/tmc-export"
    tool.write_text('#!/bin/sh\necho "called: $*"\n')
    tool.chmod(0o755)
    done = board.run(TMC_EXPORT_ONLY_TRTEXEC="0")
    assert done.stdout == "called: engine . --runtime tensorrt --workspace-mib 2048 --optimization-level 3\n" and board.lines() == []


def test_the_options_it_calls_exist() -> None:
    from tmc_export.commands.engine import command

    options = {name for parameter in command.params for name in parameter.opts}
    assert {"--runtime", "--workspace-mib", "--optimization-level"} <= options


def test_an_operator_the_board_lacks_is_refused_when_the_script_is_written(bundle: Path, graphs) -> None:
    graphs[2](bundle / "onnx/vision_0.onnx", "Swish")
    with pytest.raises(LegalityError, match="vision_0: TensorRT 10.3 .* has no Swish"):
        write_on_device_script(bundle, ORIN)
    assert not (bundle / "build_on_device.sh").exists()


def test_int4_on_jetpack_6_is_warned_of(bundle: Path, graphs) -> None:
    graphs[1](bundle / "onnx/vision_0.onnx")
    _, (warning,) = write_on_device_script(bundle, ORIN)
    assert "vision_0: opset 21 is above 20" in warning


def test_weights_that_are_widened_need_twice_the_disk(bundle: Path) -> None:
    def disk() -> int:
        script = write_on_device_script(bundle, ORIN)[0].read_text()
        return int(next(line for line in script.splitlines() if line.startswith("build block_0 ")).split()[4])

    before, file = disk(), bundle / "engines/profiles.json"
    told = json.loads(file.read_text())
    next(s for s in told["subgraphs"] if s["name"] == "block_0")["precision"] = "widened"
    file.write_text(json.dumps(told))
    spare = 16 * 1024  # KiB, whatever the weights
    assert disk() - spare == pytest.approx(2 * (before - spare), abs=2)


def test_profiles_of_the_rewritten_graph_stay(bundle: Path) -> None:
    before = json.loads((bundle / "engines/profiles.json").read_text())
    write_on_device_script(bundle, ORIN)
    assert json.loads((bundle / "engines/profiles.json").read_text()) == before
    assert b"../onnx" not in (bundle / "engines/block_0.onnx").read_bytes()
