"""The device's rung, on a made-up driver and TensorRT: it passes, and what a device gets wrong fails it. *Nothing ran on a GPU.*"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

pytest.importorskip("torch")

from tests._tiny import Ran, tmc  # noqa: E402
from tests.runtime import _fake_tensorrt  # noqa: E402
from tests.runtime._device import device  # noqa: E402
from tests.runtime._fake_cuda import FakeDriver  # noqa: E402
from tests.runtime._fake_tensorrt import place_engines  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.bundle.write import seal  # noqa: E402
from tmc_export.engine._proto import read_graph  # noqa: E402
from tmc_export.engine._versions import check_graph, version_for  # noqa: E402
from tmc_export.engine.profiles import read_profiles  # noqa: E402
from tmc_export.verify.ladder import RUNGS, climb, recorded_ladder  # noqa: E402
from tmc_export.verify.on_device import RUNG, device_precision  # noqa: E402
from tmc_export.verify.recorded import read_cases  # noqa: E402
from tmc_export.verify.tolerances import TOLERANCES  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded bundle whose engine files name their ONNX graphs; its checkpoint beside it."""
    folder = tmp_path_factory.mktemp("on_device")
    (folder / "model").symlink_to(tiny / "model")
    place_engines(Path(shutil.copytree(tiny / "bundle", folder / "bundle")))
    return folder / "bundle"


def verify(bundle: Path, *args: object) -> Ran:
    with device(FakeDriver()):
        return tmc("verify", bundle, "--backend", "tensorrt-rtx", *args)


@contextmanager
def logits_times(factor: float) -> Iterator[None]:
    """A device whose logits are off by a factor."""
    right = _fake_tensorrt.compute

    def wrong(path: Path, feed: Any) -> dict[str, np.ndarray]:
        found = right(path, feed)
        return {n: (v * np.float32(factor)).astype(v.dtype) if n == "logits" else v for n, v in found.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fake_tensorrt, "compute", wrong)
        yield


def test_a_device_plays_the_recorded_conversations(bundle: Path) -> None:
    ran = verify(bundle)
    assert ran.code == 0, ran.out + ran.err
    files, rung = ran.out.splitlines()
    cases = list(read_cases(bundle))
    steps = sum(len(t.expected.tokens) for c in cases for t in c.turns)
    assert files.startswith("files: passed") and rung.startswith(f"{RUNG}: passed")
    assert f"by tensorrt-rtx, judged as float16, because a device's float32 is TF32; {len(cases)} conversations, {steps} steps" in rung
    assert "checking tensorrt-rtx ..." in ran.err


def test_it_is_judged_by_the_checks_of_the_cpu_path(bundle: Path) -> None:
    mine = json.loads(verify(bundle, "--json").out)["rungs"][1]
    theirs = recorded_ladder(bundle).rungs[4]
    assert theirs.name == RUNGS[4] and mine["checks"] == len(theirs.checks)


@pytest.mark.slow
def test_standard_tensorrt_does_too(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    place_engines(other, "tensorrt", "10.3.0.30", ())
    with device(FakeDriver(), "10.3.0.30", rtx=False):
        ran = tmc("verify", other, "--backend", "tensorrt")
    assert ran.code == 0 and "by tensorrt, judged as float16" in ran.out, ran.out + ran.err


@pytest.mark.parametrize(("factor", "code"), [(1.001, 0), (1.1, 4)])
def test_half_precision_passes_and_more_fails(bundle: Path, factor: float, code: int) -> None:
    """0.001 of the logits is 60 dB: float32's row asks for 80, float16's for 35; 0.1 is 20."""
    assert TOLERANCES["end_to_end", "float32"].sqnr_db > 60 > TOLERANCES["end_to_end", "float16"].sqnr_db
    with logits_times(factor):
        ran = verify(bundle)
    assert ran.code == code, ran.out
    if code:
        assert f"{RUNG}: failed" in ran.out and "/turn 1/logits: differs by" in ran.error() and "28 of 40 checks" in ran.out


def test_rows() -> None:
    assert [device_precision(p) for p in ("float32", "float16", "int8 slots", "fp8 slots", "int8", "bf16")] == [
        "float16", "float16", "int8 slots, half", "fp8 slots, half", "int8", "bf16",
    ]  # fmt: skip


@pytest.mark.slow
def test_it_is_a_rung_of_the_whole_ladder(bundle: Path) -> None:
    with device(FakeDriver()):
        ladder = climb(bundle, bundle.parent / "model", steps=2, backend="tensorrt-rtx")
    assert [r.name for r in ladder.rungs] == list(RUNGS) and ladder.rungs[-1].status == "passed", ladder.text()


@pytest.mark.parametrize("release", ["10.3", "10.13", "10.16", "11.4"])
def test_the_engines_graphs_hold_no_operator_that_a_board_s_tensorrt_lacks(bundle: Path, release: str) -> None:
    graphs = [bundle / subgraph.onnx for subgraph in read_profiles(bundle)]
    warnings = [w for graph in graphs for w in check_graph(graph.stem, read_graph(graph), version_for(release))]
    assert len(graphs) == 4 and all("opset" in w for w in warnings)


# -------------------------------------------------------------------------------------------------------------- not run
def not_run(ran: Ran, code: int = 2) -> str:
    """The note of a rung that was asked for and did not run, which the command does not end well with."""
    assert ran.code == code and f"{RUNG}: not run: " in ran.out, ran.out + ran.err
    note = ran.out.split("not run: ")[-1].strip()
    assert note in ran.error() and "was not played on the device" in ran.error()
    return note


def test_without_the_package(bundle: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here: its backend may run")
    assert "the package 'tensorrt' is missing" in not_run(tmc("verify", bundle, "--backend", "tensorrt"))


def test_without_engines(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (other / "engines" / "engines.json").unlink()
    assert f"tmc-export engine {other}" in not_run(verify(other))


def test_without_recorded_conversations(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    shutil.rmtree(other / "parity")
    seal(other, open_manifest(other))
    assert "--no-record" in not_run(verify(other))


def test_a_provider_that_is_not_here(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    ran = tmc("verify", bundle, "--provider", "cuda")
    assert ran.code == 2 and "onnxruntime, provider cuda: not run: onnxruntime" in ran.out and "has no CUDAExecutionProvider" in ran.error()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--backend", "tensort"), "unknown backend 'tensort'.*did you mean 'tensorrt'"),
        (("--provider", "cudda"), "unknown provider 'cudda'.*did you mean 'cuda'"),
        (("--backend", "tensorrt", "--outputs", "x.npz"), "leave --backend and --provider out"),
    ],
)
def test_what_cannot_be_meant(bundle: Path, args: tuple[str, ...], says: str) -> None:
    import re

    ran = tmc("verify", bundle, *args)
    assert ran.code == 2 and re.search(says, ran.error().replace("\n", " ")) and "not run" not in ran.out


def test_damage_is_found_before_anything_is_played(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    path = next((other / "onnx").glob("block_0*.data"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    ran = verify(other)
    assert ran.code == 4 and path.name in ran.error() and ran.out == ""
