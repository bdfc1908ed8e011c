"""What `make package` does not see: the links, light imports where torch is installed, and that the check itself can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import tmc_export
from tools import check_packaging

OUTSIDE = ("graphs", "recipes", "devices", "cli.py")
HEAVY = "torch transformers onnx onnx_ir onnxscript optimum safetensors tensorrt tensorrt_rtx"


def heavy_after(statement: str, repository: Path) -> list[str]:
    """Run a statement in a fresh interpreter and return the heavy packages that it brought."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({HEAVY!r}.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def light_imports() -> list[str]:
    root = Path(tmc_export.__file__).parent
    rooms = [
        r
        for r in ("core", "recipe", "families", "graphs", "plan", "engine", "bundle", "runtime", "debug", "report", "api")
        if any((root / r).glob("*.py"))
    ]
    verbs = [f"commands.{p.stem}" for p in sorted((root / "commands").glob("[!_]*.py"))]
    return ["import tmc_export", "import tmc_export.cli"] + [f"import tmc_export.{name}" for name in rooms + verbs]


@pytest.mark.parametrize("statement", [*light_imports(), "from tmc_export.graphs import METHODS; list(METHODS)"])
def test_importing_brings_nothing_heavy(statement: str, repository: Path) -> None:
    assert heavy_after(statement, repository) == []


def test_the_import_check_sees_torch(repository: Path) -> None:
    assert "torch" in heavy_after("import torch", repository)


def test_help_brings_only_click(repository: Path) -> None:
    code = (
        "import sys, click\nfrom tmc_export.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'numpy', 'pydantic', 'rich', 'onnxruntime', 'PIL', 'ruamel.yaml', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Commands:" in done.stdout
    assert done.stdout.splitlines()[-1] == ""


def test_the_four_links_are_relative_and_lead_outside(repository: Path) -> None:
    links = {p.name: os.readlink(p) for p in (repository / "tmc_export").iterdir() if p.is_symlink()}
    assert links == {name: f"../{name}" for name in OUTSIDE}


def test_the_core_install_is_the_runtime(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {requirement.split(">")[0].strip() for requirement in project["dependencies"]}
    assert not core & set(HEAVY.replace("_", "-").split())
    assert {"numpy", "onnxruntime", "tokenizers", "pillow", "jinja2"} <= core
    torch = [r for extra in project["optional-dependencies"].values() for r in extra if r.startswith("torch")]
    assert torch == ["torch>=2.9"]  # the exact version is the Makefile's; torchvision has no CPU build and nothing may need it


def test_names_fetched_at_first_use() -> None:
    assert set(tmc_export.__all__) == {"__version__", "build", "load"} == set(dir(tmc_export))
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        tmc_export.biuld  # noqa: B018


def test_a_missing_and_an_extra_file_fail_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    check_packaging.same("wheel", {"a", "b"}, {"a", "b"})
    with pytest.raises(check_packaging.CheckError, match=r"missing \['b'\], not expected \['c'\]"):
        check_packaging.same("wheel", {"a", "c"}, {"a", "b"})
    assert "exactly the tracked ones" in capsys.readouterr().out


def test_the_tracked_tree_is_expected_whole(repository: Path) -> None:
    wheel = check_packaging.expected_wheel(check_packaging.tracked())
    assert {f"tmc_export/{name}" for name in ("cli.py", "py.typed", "__init__.py", "graphs/_contract.py", "core/errors.py")} <= wheel
    assert not any(name.startswith(("tmc_export/tests", "tests")) for name in wheel)


def test_a_failing_command_is_reported() -> None:
    with pytest.raises(check_packaging.CheckError, match="ended with 3"):
        check_packaging.run(sys.executable, "-c", "raise SystemExit(3)")


def test_no_bundle_says_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_packaging.run_bundle(Path(sys.executable), "") is False
    assert "bundle: not run" in capsys.readouterr().out


def test_python310_is_one_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TMC_PYTHON310", raising=False)
    assert check_packaging.python310() is None
    for version, found in (("3.10.99", True), ("3.11.2", False)):
        python = tmp_path / "python3.10"
        python.write_text(f"#!/bin/sh\necho Python {version}\n", encoding="utf-8")
        python.chmod(0o755)
        assert (check_packaging.python310() == str(python)) is found
    python.write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")  # a shim without the version behind it
    assert check_packaging.python310() is None
