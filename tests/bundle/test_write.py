"""Atomic folders: whole or absent, however the writer ends and whoever else writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tmc_export.bundle.manifest import MANIFEST
from tmc_export.bundle.write import atomic_folder, check_replaceable, hash_file
from tmc_export.core.errors import BundleError, NotABundleError


def write(target: Path, text: str) -> None:
    with atomic_folder(target) as work:
        (work / MANIFEST).write_text(text)


def test_appears_at_the_end_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as work:
        (work / MANIFEST).write_text("1")
        assert not target.exists() and work.parent == target.parent
    write(target, "2")
    assert (target / MANIFEST).read_text() == "2" and os.listdir(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError(), OSError(28, "full"), KeyboardInterrupt()])
def test_an_error_leaves_everything_as_it_was(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out"
    for there in (False, True):
        if there:
            write(target, "old")
        with pytest.raises(type(error)), atomic_folder(target) as work:
            (work / MANIFEST).write_text("new")
            raise error
        assert os.listdir(tmp_path) == (["out"] if there else [])
    assert (target / MANIFEST).read_text() == "old"


def test_somebodys_files_are_safe(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(NotABundleError, match=name), atomic_folder(tmp_path / name):
            pytest.fail("the folder was given out")
    for name in ("empty", "absent"):
        check_replaceable(tmp_path / name)
        write(tmp_path / name, "x")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "1")
    write(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / MANIFEST).read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_another_writer_ends_first(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as work:
        (work / MANIFEST).write_text("slow")
        write(target, "fast")
        assert (target / MANIFEST).read_text() == "fast" and work.is_dir()  # a folder whose writer lives is not cleaned away
    assert (target / MANIFEST).read_text() == "slow" and os.listdir(tmp_path) == ["out"]


def test_another_writer_comes_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, real, calls = tmp_path / "out", Path.rename, iter(range(100))
    monkeypatch.setattr("tmc_export.bundle.work.exchange", lambda one, other: False)  # as on a system that cannot

    def rename(self: Path, to: Path) -> Path:
        if self.suffix == ".part" and next(calls) == 0:
            target.mkdir()
            (target / MANIFEST).write_text("fast")
        return real(self, to)

    write(target, "old")
    monkeypatch.setattr(Path, "rename", rename)
    write(target, "slow")
    assert (target / MANIFEST).read_text() == "slow" and os.listdir(tmp_path) == ["out"]


def test_a_rename_that_fails_brings_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, real = tmp_path / "out", Path.rename
    monkeypatch.setattr("tmc_export.bundle.work.exchange", lambda one, other: False)

    def rename(self: Path, to: Path) -> Path:
        if self.suffix == ".part":
            raise PermissionError(13, "Permission denied", str(to))
        return real(self, to)

    write(target, "old")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError):
        write(target, "new")
    assert (target / MANIFEST).read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_leftovers_of_the_dead(tmp_path: Path) -> None:
    """`.part` goes; a bundle that had been put aside comes back; folders of other targets and of other makers stay."""
    for name in (".out.abcdefgh.part", ".out.b.abcdefgh.part", ".outer.abcdefgh.part", ".out.notes", ".out.long-name-.part"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.abcdefgh.old").mkdir()
    (tmp_path / ".out.abcdefgh.old" / MANIFEST).write_text("old")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "out"):
        raise ValueError
    assert (tmp_path / "out" / MANIFEST).read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == [".out.b.abcdefgh.part", ".out.long-name-.part", ".out.notes", ".outer.abcdefgh.part", "out"]
    (tmp_path / ".out.12345678.old").mkdir()
    write(tmp_path / "out", "new")
    assert not (tmp_path / ".out.12345678.old").exists()


def test_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert issubclass(NotABundleError, BundleError)


def test_a_folder_that_another_builder_takes_away_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    right = os.open

    def late(path: str | Path, *rest: int, **more: int) -> int:
        if more:  # shutil's own
            return right(path, *rest, **more)
        opened.append(str(path))
        if len(opened) == 1:
            Path(path).rmdir()
        return right(path, *rest)

    monkeypatch.setattr("tmc_export.bundle.work.os.open", late)
    with atomic_folder(tmp_path / "out") as work:
        (work / "manifest.json").write_text("{}", "utf-8")
    assert opened[0] != opened[1] and [p.name for p in tmp_path.iterdir()] == ["out"]
