"""The folder of a build with a key: found again when its builder was killed, waited for while it lives."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tmc_export.bundle.journal import JOURNAL
from tmc_export.bundle.manifest import MANIFEST
from tmc_export.bundle.work import WorkFolder, remove_remains
from tmc_export.core.files import exchange

A, B = "a" * 64, "b" * 64


def fill(work: WorkFolder, text: str) -> None:
    (work.path / MANIFEST).write_text(text)


class Killed(BaseException):
    """What a test raises for an interrupt."""


def left_by(target: Path, key: str | None, text: str = "half") -> list[str]:
    with pytest.raises(Killed), WorkFolder(target, key=key) as work:
        fill(work, text)
        raise Killed
    return sorted(os.listdir(target.parent))


def test_an_interrupted_build_is_found_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert left_by(target, A) == [f".out.{A[:16]}.part"]
    with WorkFolder(target, key=A) as work:
        assert (work.path / MANIFEST).read_text() == "half" and not work.waited
        (work.path / JOURNAL).touch()
        work.publish()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == [MANIFEST]


@pytest.mark.parametrize("error", [ValueError("x"), OSError(28, "No space left on device"), MemoryError()])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, WorkFolder(tmp_path / "out", key=A) as work:
        fill(work, "half")
        raise error
    assert os.listdir(tmp_path) == []
    if isinstance(error, OSError):
        assert caught.value.filename == str(tmp_path / "out")  # the line that a user sees names a place


def test_without_a_key_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    assert left_by(tmp_path / "out", None) == []


def test_another_key_removes_what_is_left_and_the_same_key_does_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    left_by(target, A)
    assert left_by(target, B) == [f".out.{B[:16]}.part"]
    left_by(tmp_path / "out.b", A)
    remove_remains(target)
    assert os.listdir(tmp_path) == [f".out.b.{A[:16]}.part"]  # of another target


def test_not_published_is_not_there(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "out", key=A) as work:
        fill(work, "x")
    assert os.listdir(tmp_path) == []


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The old bundle was put aside, the new one is whole: the old one comes back, and the new one is taken up again."""
    target = tmp_path / "out"
    with WorkFolder(target, key=B) as work:
        fill(work, "old")
        work.publish()
    left_by(target, A, "new")
    target.rename(tmp_path / f".out.{A[:16]}.old")
    with WorkFolder(target, key=A) as work:
        assert (target / MANIFEST).read_text() == "old" and (work.path / MANIFEST).read_text() == "new"
        work.publish()
    assert (target / MANIFEST).read_text() == "new" and os.listdir(tmp_path) == ["out"]


def test_killed_when_only_the_tidying_up_was_left(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with WorkFolder(target, key=A) as work:
        fill(work, "new")
        work.publish()
    (target / JOURNAL).touch()
    (tmp_path / f".out.{A[:16]}.old").mkdir()
    remove_remains(target)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == [MANIFEST]


# --------------------------------------------------------------------------------------------------------- two at once
HOLDER = """
import sys, time
from pathlib import Path
from tmc_export.bundle.work import WorkFolder
with WorkFolder(Path(sys.argv[1]), key=sys.argv[2]) as work:
    (work.path / "manifest.json").write_text("first")
    print(flush=True)
    sys.stdin.readline()
    work.publish()
"""


def holder(target: Path, key: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, target, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "\n"
    return process


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    target = tmp_path / "out"
    first, said = holder(target, A), list[str]()

    def waiting() -> None:
        said.append("waits")
        assert first.stdin is not None
        first.stdin.write("\n")
        first.stdin.flush()

    with WorkFolder(target, key=A, waiting=waiting) as work:
        assert said == ["waits"] and work.waited
        assert (target / MANIFEST).read_text() == "first"
        assert os.listdir(work.path) == []  # the first one's folder is in its place: this is a new one
    assert first.wait() == 0 and os.listdir(tmp_path) == ["out"]


def test_the_second_goes_on_when_the_first_is_killed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = holder(target, A)
    with WorkFolder(target, key=A, waiting=first.kill) as work:
        assert work.waited and (work.path / MANIFEST).read_text() == "first"
        work.publish()
    first.wait()
    assert (target / MANIFEST).read_text() == "first" and os.listdir(tmp_path) == ["out"]


def test_a_living_builder_of_another_key_is_not_disturbed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = holder(target, A)
    began = time.monotonic()
    with WorkFolder(target, key=B, waiting=lambda: pytest.fail("it waits")) as work:
        fill(work, "second")
        work.publish()
    assert time.monotonic() - began < 10 and (target / MANIFEST).read_text() == "second"
    assert (tmp_path / f".out.{A[:16]}.part" / MANIFEST).read_text() == "first"
    first.communicate("\n")
    assert (target / MANIFEST).read_text() == "first" and os.listdir(tmp_path) == ["out"]  # who ends last stays


def test_where_there_are_no_locks_nothing_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could tell a living builder's folder from a dead one's: each builder gets its own, and leaves nothing."""
    import fcntl

    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    target = tmp_path / "out"
    assert left_by(target, A) == []
    with WorkFolder(target, key=A) as first, WorkFolder(target, key=A) as second:
        assert first.path != second.path
        fill(first, "1")
        fill(second, "2")
        second.publish()
        first.publish()
    assert (target / MANIFEST).read_text() == "1" and os.listdir(tmp_path) == ["out"]


# ------------------------------------------------------------------------------------------------------------ put in place
@pytest.mark.parametrize("can", [True, False], ids=["in one step", "in two renames"])
def test_an_interrupt_while_it_is_put_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    """At any moment the target is the old bundle or the new one, and afterwards one of them."""
    target, moments = tmp_path / "out", 0
    right, swap = Path.rename, exchange

    def now(moment: int) -> None:
        nonlocal moments
        if moments == moment:
            moments = 0
            raise Killed

    def rename(self: Path, to: Path) -> Path:
        now(1)
        done = right(self, to)
        now(2)
        return done

    def once(one: Path, other: Path) -> bool:
        if not can:
            return False
        now(1)
        assert swap(one, other) and (target / MANIFEST).read_text() == "new"
        now(2)
        return True

    for when in (1, 2):
        with WorkFolder(target, key=B) as work:
            fill(work, "old")
            work.publish()
        moments = when
        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr("tmc_export.bundle.work.exchange", once)
        with pytest.raises(Killed), WorkFolder(target, key=A) as work:
            fill(work, "new")
            work.publish()
        monkeypatch.undo()
        remove_remains(target)
        assert os.listdir(tmp_path) == ["out"]
        assert (target / MANIFEST).read_text() == ("new" if can and when == 2 else "old")


def test_two_folders_change_places(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b") and os.listdir(tmp_path / "a") == ["b"]
    assert not exchange(tmp_path / "a", tmp_path / "none") and os.listdir(tmp_path / "a") == ["b"]
