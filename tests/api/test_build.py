"""`build`: cache hits, equal bytes, overrides, and engines that cannot be built here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests._tiny import TEXT_ONLY, listing, save_tiny_model, tmc, write_recipe
from tmc_export.api import build, load
from tmc_export.bundle.read import check_files, open_manifest
from tmc_export.core.errors import MissingExtraError, RecipeError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    save_tiny_model(folder / "model")
    return write_recipe(folder)


@pytest.fixture(scope="module")
def bundle(recipe: Path) -> Path:
    """Built once, to be read only."""
    result = build(recipe, recipe.parent / "bundle", record=False)
    assert not result.cached
    check_files(result.folder, result.manifest)
    return result.folder


def copied(bundle: Path, out: Path) -> Path:
    return Path(shutil.copytree(bundle, out / "bundle"))


@pytest.fixture
def text(recipe: Path, tmp_path: Path) -> Path:
    """A recipe of one block and no picture, which builds fast."""
    (tmp_path / "model").symlink_to(recipe.parent / "model")
    return write_recipe(tmp_path, TEXT_ONLY)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------------------ cache
def test_a_cache_hit_touches_nothing(recipe: Path, bundle: Path) -> None:
    before = listing(bundle)
    began = time.perf_counter()
    result = build(recipe, bundle, record=False)
    assert result.cached and result.manifest == open_manifest(bundle)
    assert time.perf_counter() - began < 2
    assert listing(bundle) == before
    ran = tmc("build", recipe, "-o", bundle, "--no-record")
    assert ran.code == 0 and "up to date" in ran.out


def test_a_cache_hit_imports_no_torch_and_is_fast(recipe: Path, bundle: Path) -> None:
    """In a process of its own; seconds of processor time, since other tests may run beside it."""
    code = (
        "import sys, time; from tmc_export.api import build\n"
        f"result = build({str(recipe)!r}, {str(bundle)!r}, record=False)\n"
        "heavy = [m for m in ('torch', 'transformers', 'onnx_ir', 'onnxruntime') if m in sys.modules]\n"
        "print(result.cached, heavy, time.process_time() < 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True [] True", done.stdout


def test_what_makes_a_cache_miss(recipe: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the key alone: the build itself is stopped where it would begin."""
    import tmc_export.api.bundling as bundling

    class BuildBegins(Exception):
        pass

    def begins(*_: object, **__: object) -> None:
        raise BuildBegins

    monkeypatch.setattr(bundling, "require", begins)

    def missed(**changes: object) -> bool:
        try:
            return not build(recipe, out, **{"record": False, **changes}).cached  # type: ignore[arg-type]
        except BuildBegins:
            return True

    out = copied(bundle, tmp_path)
    assert not missed()
    assert missed(force=True) and missed(record=True) and missed(engines=True)
    assert missed(overrides=["compress.0.keep=5"]) and missed(overrides=["inputs.new_tokens=8"])
    weights = recipe.parent / "model" / "model.safetensors"
    times = weights.stat()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert missed()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not missed()
    graph = out / "onnx" / "block_0_decode.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[:-1])
    assert missed()
    graph.unlink()
    assert missed()
    graph.write_bytes(data)
    assert not missed()
    (out / "manifest.json").write_text("{")
    assert missed()


def test_a_changed_method_is_a_cache_miss(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest covers the method library, which lies behind a link in a checkout."""
    import tmc_export.api.bundling as bundling

    (tmp_path / "graphs").mkdir()
    (tmp_path / "tmc_export" / "api").mkdir(parents=True)
    (tmp_path / "tmc_export" / "graphs").symlink_to("../graphs")
    method = tmp_path / "graphs" / "fastv.py"
    monkeypatch.setattr(bundling, "__file__", str(tmp_path / "tmc_export" / "api" / "bundling.py"))
    method.write_text("keep = 1")
    first = bundling._source_digest()
    method.write_text("keep = 2")
    assert bundling._source_digest() != first
    method.write_text("keep = 1")
    assert bundling._source_digest() == first


# ------------------------------------------------------------------------------------------------------------------ bytes
def test_force_gives_the_same_bytes(recipe: Path, bundle: Path, tmp_path: Path) -> None:
    again = build(recipe, tmp_path / "again", force=True, record=False)
    assert not again.cached
    first, second = bytes_of(bundle), bytes_of(again.folder)
    assert set(first) == set(second)
    different = [name for name in first if first[name] != second[name] and name != "manifest.json"]
    assert not different
    assert any(name.startswith("onnx/") for name in first) and any(name.startswith("engines/") for name in first)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(recipe: Path, bundle: Path, tmp_path: Path) -> None:
    """Hash seeds differ from process to process."""
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "tmc_export.cli", "build", str(recipe), "-o", str(tmp_path / seed), "-q", "--no-record"]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True)
        assert bytes_of(tmp_path / seed / "onnx") == bytes_of(bundle / "onnx")


# -------------------------------------------------------------------------------------------------------------- overrides
def test_overrides_reach_the_bundle(text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    result = build(text, tmp_path / "out", overrides=["inputs.new_tokens=5", "name=other"], record=False, progress=lines.append)
    assert result.manifest.name == "other" and result.manifest.program.new_tokens == 5
    assert open_manifest(tmp_path / "out").recipe["name"] == "other"
    assert any("block_0" in line for line in lines)
    answer = load(tmp_path / "out", threads=1).generate((), "what is it")
    assert len(answer.tokens) == 5
    with pytest.raises(RecipeError, match="new_tokns"):
        build(text, tmp_path / "none", overrides=["inputs.new_tokns=5"])
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------------------------------------------- engines
def test_without_the_extra_the_bundle_is_good(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tmc_export.engine.bundle as engines

    def absent(flavour: str) -> None:
        raise MissingExtraError("cannot build engines: the package 'tensorrt_rtx' is missing; pip install 'tmc-export[rtx]'")

    monkeypatch.setattr(engines, "probe", absent)
    lines: list[str] = []
    result = build(text, tmp_path / "out", engines=True, record=False, progress=lines.append)
    assert result.manifest.proofs["engines"].startswith("not run: ") and "tmc-export[rtx]" in result.manifest.proofs["engines"]
    assert any("engines were not built" in line for line in lines)
    check_files(result.folder, open_manifest(result.folder))
    assert not list(result.folder.rglob("*.engine"))
    assert load(result.folder, threads=1).generate((), "what", max_new_tokens=2).finish == "length"
    before = listing(result.folder)
    ran = tmc("engine", result.folder)
    assert ran.code == 2 and "tmc-export[rtx]" in ran.error()
    assert listing(result.folder) == before


def test_no_engines_unless_the_recipe_or_the_caller_asks(bundle: Path) -> None:
    manifest = open_manifest(bundle)
    assert not list(bundle.rglob("*.engine")) and not manifest.proofs.get("engines", "").startswith("passed")
    assert manifest.proofs["execution on a GPU"] == "not run"
