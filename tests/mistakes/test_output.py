"""What a build leaves behind when it cannot end: the folder as it was, and no temporary folder."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests._tiny import RECIPE, TEXT_ONLY, listing, tmc, write_recipe
from tmc_export.bundle.read import check_files, open_manifest


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    """A recipe of one block in a folder of its own."""
    (tmp_path / "model").symlink_to(model)
    return write_recipe(tmp_path, TEXT_ONLY)


def build(recipe: Path, out: Path, *args: object) -> list[object]:
    return ["build", recipe, "-o", out, "-q", "--no-record", *args]


def whole(bundle: Path) -> None:
    """Fail unless every file is as the manifest says."""
    check_files(bundle, open_manifest(bundle))


# ------------------------------------------------------------------------------------------------- folders that are taken
def test_a_folder_with_somebodys_files(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    before = listing(tmp_path)
    for args in ([], ["--force"]):
        ran = tmc(*build(recipe, out, *args))
        assert ran.code == 2 and "not a bundle" in ran.error() and "choose another folder" in ran.err
    assert listing(tmp_path) == before and (out / "thesis.txt").read_text() == "years of work"


def test_a_path_that_is_a_file(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    before = listing(tmp_path)
    ran = tmc(*build(recipe, tmp_path / "out"))
    assert ran.code == 2 and "is a file" in ran.error()
    ran = tmc(*build(recipe, tmp_path / "out" / "below"))
    assert ran.code == 2 and "out" in ran.error()
    assert listing(tmp_path) == before


def test_a_parent_that_cannot_be_written(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere: stand in for the system's refusal
        mkdir = Path.mkdir

        def refuse(self: Path, *args: object, **more: object) -> None:
            if self.parent == parent:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            mkdir(self, *args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "mkdir", refuse)
    ran = tmc(*build(recipe, parent / "out"))
    assert ran.code == 2 and "Permission denied" in ran.error() and "locked" in ran.err
    assert list(parent.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- ends in the middle
@pytest.fixture
def taken(recipe: Path, built: Path, tmp_path: Path) -> Path:
    """The output folder holds a good bundle already."""
    return Path(shutil.copytree(built, tmp_path / "out"))


def _break(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> list[Path]:
    """Make one of a build's writes fail; returns a list that tells what lay in the temporary folder then."""
    seen: list[Path] = []

    def fail(*args: object, **_: object) -> None:
        place = next(a for a in args if isinstance(a, Path))
        work = next(p for p in (place, *place.parents) if p.suffix == ".part")
        seen.extend(p for p in work.rglob("*") if p.is_file())
        raise error

    if where == "weights":
        from tmc_export.export.store import WeightStore

        real, calls = WeightStore._append, iter(range(100))

        def append(self: WeightStore, file: str, data: bytes) -> tuple[str, int, int]:
            if next(calls) == 2:
                fail(self.folder)
            return real(self, file, data)

        monkeypatch.setattr(WeightStore, "_append", append)
    elif where == "graph":
        import onnx_ir as ir

        save, saved = ir.save, iter(range(100))
        monkeypatch.setattr(ir, "save", lambda graph, path: save(graph, path) if next(saved) == 0 else fail(Path(path)))
    elif where == "sidecars":
        monkeypatch.setattr(shutil, "copyfile", lambda source, out: fail(out))
    else:
        import tmc_export.api.bundling as bundling

        monkeypatch.setattr(bundling, "seal", lambda folder, manifest: fail(folder / "x"))
    return seen


FULL = OSError(errno.ENOSPC, "No space left on device", "out/onnx/block_0.data")
ENDS = [
    pytest.param(FULL, 5, "No space left on device", id="full disk"),
    pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded", "x"), 5, "quota", id="quota"),
    pytest.param(MemoryError("Unable to allocate 8 GiB"), 5, "8 GiB", id="memory"),
    pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), 5, "memory", id="torch"),
]


@pytest.mark.parametrize(("error", "code", "says"), ENDS)
def test_the_bundle_before_stays(
    recipe: Path, taken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    before = listing(tmp_path)
    seen = _break(monkeypatch, "graph", error)
    ran = tmc(*build(recipe, taken, "--force"))
    assert ran.code == code and says in ran.error()
    assert seen  # it was in the middle: something had been written
    assert listing(tmp_path) == before
    whole(taken)


def test_after_an_interrupt_the_bundle_before_stays_and_the_work_waits(
    recipe: Path, taken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(tmp_path)
    with monkeypatch.context() as patch:
        _break(patch, "graph", KeyboardInterrupt())
        ran = tmc(*[a for a in build(recipe, taken, "--force") if a != "-q"])
    assert ran.code == 130 and "interrupted" in ran.error() and "the same command goes on where this one stopped" in ran.err
    (left,) = tmp_path.glob(".out.*")
    work = {name for name in listing(tmp_path) if name.startswith(left.name)}
    assert {n: at for n, at in listing(tmp_path).items() if n not in work} == before and f"{left.name}/onnx/embed.data" in work
    ran = tmc(*[a for a in build(recipe, taken, "--force") if a != "-q"])
    assert ran.code == 0 and "going on where an earlier build stopped" in ran.err
    assert not list(tmp_path.glob(".out.*"))
    whole(taken)


@pytest.mark.parametrize("where", ["weights", "sidecars", "manifest"])
def test_nothing_is_left_where_nothing_was(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = listing(tmp_path)
    seen = _break(monkeypatch, where, FULL)
    ran = tmc(*build(recipe, tmp_path / "out"))
    assert ran.code == 5 and "free some space" in ran.error()
    assert seen
    assert listing(tmp_path) == before


# ------------------------------------------------------------------------------------------------- sudden ends, many builders
def _writer(target: Path, then: str) -> subprocess.Popen[str]:
    """Start a process that writes a bundle-like folder; it needs none of the heavy packages."""
    code = (
        "import sys, time; from pathlib import Path; from tmc_export.bundle.write import atomic_folder\n"
        f"with atomic_folder(Path({str(target)!r})) as work:\n"
        "    for i in range(20): (work / f'{i}.data').write_text(sys.argv[1])\n"
        "    (work / 'manifest.json').write_text('{}'); print('written', flush=True)\n"
        f"    {then}\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(os.urandom(4).hex())], stdout=subprocess.PIPE, text=True)


def test_what_a_killed_builder_left_is_removed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _writer(out, "time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    (left,) = tmp_path.glob(".out.*.part")
    assert tmc(*build(recipe, out)).code == 0
    assert left.is_dir()  # its builder lives
    process.kill()
    process.wait()
    assert not tmc(*build(recipe, out, "--force")).err
    assert not left.exists() and not list(tmp_path.glob(".out.*"))
    whole(out)


def test_many_builders_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    builders = [_writer(out, "time.sleep(0.01)") for _ in range(6)]
    assert [b.wait(timeout=60) for b in builders] == [0] * 6
    assert len({p.read_text() for p in out.glob("*.data")}) == 1 and len(list(out.glob("*.data"))) == 20  # one of them, whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_build_while_the_old_bundle_is_open(recipe: Path, taken: Path) -> None:
    from tmc_export.runtime.session import load

    session = load(taken, threads=1)
    before = session.generate((), "what is it", max_new_tokens=4).tokens
    assert tmc(*build(recipe, taken, "--force")).code == 0
    assert session.generate((), "what is it", max_new_tokens=4).tokens == before
    assert open_manifest(taken).program.images == 0 and session.program.images == 1


def _command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "tmc_export.cli", *map(str, build(recipe, out))]


def _until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not done():
        assert process.poll() is None and time.monotonic() < end, "the build ended before it could be stopped"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, None)])
def test_a_real_build_that_is_stopped(recipe: Path, tmp_path: Path, sign: signal.Signals, code: int | None) -> None:
    write_recipe(tmp_path, RECIPE)
    process = subprocess.Popen(_command(recipe, tmp_path / "out"), stderr=subprocess.PIPE, text=True)
    _until(lambda: any(tmp_path.glob(".out.*.part/onnx/*.onnx")), process)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    if code is not None:
        assert process.returncode == code
    if sign == signal.SIGINT:
        assert err.strip() == "error: interrupted"
    assert len(list(tmp_path.glob(".out.*.part"))) == 1  # the next build goes on there
    assert tmc(*build(recipe, tmp_path / "out")).code == 0
    assert not list(tmp_path.glob(".out.*"))
    whole(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("out", "out"), ("out", "out.b")], ids=["one target", "two targets"])
def test_two_real_builds_at_once(recipe: Path, tmp_path: Path, targets: tuple[str, str]) -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    builds = [subprocess.Popen(_command(recipe, tmp_path / target), **pipes) for target in targets]
    ends = [(*b.communicate(timeout=300), b.returncode) for b in builds]
    assert [(err, code) for _, err, code in ends] == [("", 0), ("", 0)]
    waited = len(set(targets)) == 1  # one builds, the other takes what it built
    assert sorted("up to date" in out for out, _, _ in ends) == [False, waited]
    assert not list(tmp_path.glob(".out.*"))
    for target in targets:
        whole(tmp_path / target)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_really_full_disk(model: Path, small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    ran = tmc(*build(write_recipe(tmp_path, RECIPE), small_disk / "out"))
    assert ran.code == 5 and "No space left on device" in ran.error()
    assert list(small_disk.iterdir()) == []
