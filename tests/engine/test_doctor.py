from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from tmc_export.commands.doctor import command as doctor
from tmc_export.commands.engine import command as engine
from tmc_export.engine import Builder, EngineRecord
from tmc_export.engine._device import CudaDevice
from tmc_export.engine.bundle import _write
from tmc_export.engine.doctor import EXTRAS, examine_engines, examine_machine, jetpack

RTX = Builder("tensorrt-rtx", "1.7.1.116", ())
ORIN = Builder("tensorrt", "10.3.0.30", ("SM87",))
RECORD = EngineRecord("block_0", "tensorrt-rtx", "1.7.1.116", ("SM89",), "engines/b.engine", 4, "0", "0", ("prefill",))


def gpu(capability: str) -> CudaDevice:
    return CudaDevice("a GPU", capability, 8192, "13.0")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines/b.engine").write_bytes(b"plan")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "builders", "device", "state", "words"),
    [
        ({}, (RTX,), gpu("SM89"), "ok", "for SM89"),
        ({}, (RTX,), None, "ok", "for SM89"),
        ({}, (replace(RTX, version="1.8.0.1"),), gpu("SM89"), "problem", "this machine has 1.8.0.1"),
        ({}, (RTX,), gpu("SM120"), "problem", "made for SM89; this GPU is SM120"),
        ({"bytes": 5}, (RTX,), gpu("SM89"), "problem", "of another size"),
        ({}, (), None, "absent", "not installed here"),
        ({"flavour": "tensorrt", "version": "10.3.0", "capabilities": ("SM87",)}, (ORIN,), gpu("SM87"), "ok", "10.3.0"),
        ({"flavour": "tensorrt", "version": "10.13.0", "capabilities": ("SM87",)}, (ORIN,), gpu("SM87"), "problem", "has 10.3.0.30"),
    ],
)
def test_engines(built: Path, change: dict, builders: tuple[Builder, ...], device: CudaDevice | None, state: str, words: str) -> None:
    record = replace(RECORD, **change)
    _write(built, {(record.name, record.flavour): record})
    (finding,) = examine_engines(built, builders, device)
    assert finding.state == state and words in finding.value
    assert (f"rebuild with: tmc-export engine {built} --runtime {record.flavour}" in finding.advice) == (state == "problem")
    if "SM120" in words:
        assert finding.advice.endswith("--capability SM120")


def test_no_engines(tmp_path: Path) -> None:
    (finding,) = examine_engines(tmp_path, (), None)
    assert finding.state == "absent" and f"tmc-export engine {tmp_path}" in finding.advice


def test_a_jetson(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1000000 kB\n")
    findings = {finding.name: finding for finding in examine_machine(tmp_path)[0]}
    assert findings["JetPack"].value == "L4T 36.4.3, JetPack 6.1 or 6.2"
    assert findings["free memory"].state == "problem" and findings["free memory"].value == "1.0 GiB"
    assert jetpack("something else") is None and "does not know" in str(jetpack("# R99 (release), REVISION: 1.0"))


def test_a_machine_with_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("tmc_export.engine.doctor.cuda_device", lambda: None)
    findings = {finding.name: finding for finding in examine_machine(tmp_path)[0]}
    names = ("JetPack", "GPU", "CUDA driver", "TensorRT", "TensorRT-RTX", "free memory", *(f"extra [{extra}]" for extra, _, _ in EXTRAS))
    assert {findings[name].state for name in names} == {"absent"}
    assert "pip install 'tmc-export[rtx]'" in findings["TensorRT-RTX"].advice


def test_commands(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    run = CliRunner()
    built = run.invoke(engine, [str(bundle), "--json", "--capability", "SM86"])
    assert built.exit_code == 0, built.output
    (block, vision) = json.loads(built.stdout)
    assert block["file"] == "engines/block_0.tensorrt-rtx.engine" and block["built"] and vision["profiles"] == ["static"]
    assert block["capabilities"] == ["SM86"]
    kept = run.invoke(engine, [str(bundle)])  # for the GPU it was built for before
    assert kept.exit_code == 0 and "block_0" in kept.stdout and "kept" in kept.stdout and "built, not run" in kept.stdout
    seen = run.invoke(doctor, [str(bundle), "--json"])
    findings = {finding["name"]: finding for finding in json.loads(seen.stdout)["findings"]}
    assert findings["engine block_0"]["state"] != "absent" and "SM86" in findings["engine block_0"]["value"]
    text = run.invoke(doctor, [])
    assert text.exit_code == 0 and "TensorRT-RTX" in text.stdout
