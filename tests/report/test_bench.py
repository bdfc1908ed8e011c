from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests._tiny import TEXT_ONLY, save_tiny_model, tmc, write_recipe
from tmc_export.core.errors import BundleError, ResourceError, RuntimeInputError
from tmc_export.report import bench as module
from tmc_export.report._bench_text import render
from tmc_export.report._bench_worker import Job
from tmc_export.report.bench import Spread, bench


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save_tiny_model(folder / "model")
    ran = tmc("build", write_recipe(folder, TEXT_ONLY), "-o", folder / "out", "--no-record", "-q")
    assert ran.code == 0, ran.err
    return folder / "out"


def answer(first: list[float], token: list[float], peak: float | None = 100.0) -> dict[str, Any]:
    return {"first_token_ms": first, "token_ms": token, "load_ms": 5.0, "peak_mib": peak, "prompt_tokens": 9, "visual_tokens": [4, 2]}


def test_a_bundle_against_itself(bundle: Path) -> None:
    ran = tmc("bench", bundle, "--against", bundle, "--runs", "2", "--answers", "2", "--tokens", "3", "--prompt", "the", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    for one in found["bundles"]:
        assert one["first_token_ms"]["count"] == 4 and one["token_ms"]["count"] == 6 and one["load_ms"]["count"] == 2
        assert 0 < one["first_token_ms"]["least"] <= one["first_token_ms"]["median"] <= one["first_token_ms"]["most"]
        assert one["prompt_tokens"] > 0 and one["visual_tokens"] == []
        assert one["peak_mib"]["median"] > 20  # an interpreter with numpy and onnxruntime is larger
        assert one["predicted"]["prompt_operations"] > 0 and "no figure" in one["predicted"]["why_not"]
    assert found["compared"]["bundle"] == found["compared"]["prompt_operations"] == 1.0
    assert ran.err.count("run 1 of 2") == 2


def test_the_process_that_times_has_no_torch() -> None:
    code = "import sys, tmc_export.report._bench_worker; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip() == "[]"


def test_processes_take_turns_and_ratios_are_of_pairs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    order: list[str] = []
    figures = {str(bundle): iter([[10.0, 12.0, 99.0], [40.0]]), str(other): iter([[20.0], [30.0]])}

    def run(job: Job) -> dict[str, Any]:
        order.append(job.bundle)
        return answer(next(figures[job.bundle]), [1.0] if job.bundle == str(bundle) else [])

    monkeypatch.setattr(module, "_run", run)
    result = bench(bundle, other, runs=2)
    assert order == [str(bundle), str(other), str(other), str(bundle)]
    assert result.compared is not None
    assert result.compared.first_token == Spread((12 / 20 + 40 / 30) / 2, 12 / 20, 40 / 30, 2)
    assert result.compared.token is None and result.bundles[1].token_ms is None
    assert result.bundles[0].first_token_ms == Spread(26.0, 10.0, 99.0, 4)
    text = render(result)
    assert "first token   0.967 (0.600..1.333)" in text and "per token     not measured" in text and "visual tokens 4 -> 2" in text


def test_a_prediction_is_shown_beside_the_measurement(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    path = other / "report" / "plan.json"
    report = json.loads(path.read_text("utf-8"))
    report["device"], report["estimate"]["first_token_s"] = "jetson-agx-orin-64gb", 0.0125
    path.write_text(json.dumps(report), "utf-8")
    monkeypatch.setattr(module, "_run", lambda job: answer([3.0], [1.0]))
    text = render(bench(other, runs=1))
    assert "first token   3.000 ms (3.000..3.000, 1 runs); predicted 12.5 ms on jetson-agx-orin-64gb (lower bound)" in text
    path.unlink()
    assert "not predicted: the bundle has no plan report" in render(bench(other, runs=1))
    path.write_text('{"estimate": []}', "utf-8")
    with pytest.raises(BundleError, match="not a plan report"):
        bench(other, runs=1)


def test_what_goes_wrong_in_the_process_is_this_command_s_error(bundle: Path, tmp_path: Path) -> None:
    ran = tmc("bench", bundle, "--runs", "1", "--image", tmp_path / "none.png")
    assert ran.code == RuntimeInputError.exit_code and "picture" in ran.error()
    ran = tmc("bench", tmp_path, "--runs", "1")
    assert ran.code == 2 and "is not a bundle" in ran.error()
    ran = tmc("bench", bundle, "--against", tmp_path / "none", "--runs", "1")
    assert ran.code == 2 and "none" in ran.error()


@pytest.mark.parametrize(("code", "error"), [(-9, ResourceError), (1, BundleError), (0, BundleError)])
def test_a_process_that_dies_is_told_apart(code: int, error: type[Exception], bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], code, stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: ended)
    with pytest.raises(error, match=str(bundle)):
        bench(bundle, runs=1)
