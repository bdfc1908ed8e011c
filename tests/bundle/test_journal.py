"""The journal of a build: what it records comes back, and what does not hold is not believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmc_export.bundle.journal import JOURNAL, Journal

KEY = "a" * 64
DATA = {"a": b"A" * 5000, "b": b"B" * 3000, "c": b"C" * 2000}


def append(journal: Journal, key: str, file: str = "onnx/w.data") -> None:
    """Append a tensor as the weight store does, at a multiple of 4096."""
    path = journal.folder / file
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as out:
        out.write(bytes(-out.tell() % 4096))
        offset = out.tell()
        out.write(DATA[key])
    journal.wrote(key, (file, offset, len(DATA[key])), DATA[key])


def graph(journal: Journal, name: str, text: str = "graph") -> None:
    path = journal.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{text} {name}")
    journal.finish(name.split("/")[-1], [name], {"numbers": [1, 2.5], "text": "é"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tensors, a step, another tensor, another step."""
    journal = Journal(tmp_path, KEY)
    assert journal.resumed is None and journal.problem is None
    append(journal, "a")
    append(journal, "b")
    graph(journal, "onnx/one")
    append(journal, "c")
    graph(journal, "onnx/two")
    return tmp_path


def opened(folder: Path, key: str = KEY) -> tuple[list[str], list[str], str | None]:
    """Return the tensors and the steps that are believed, and the problem."""
    journal = Journal(folder, key)
    return list(journal.places), list(journal.steps), journal.problem


def test_everything_comes_back(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    journal = Journal(folder, KEY)
    assert journal.places == {"a": ("onnx/w.data", 0, 5000), "b": ("onnx/w.data", 8192, 3000), "c": ("onnx/w.data", 12288, 2000)}
    assert journal.steps == dict.fromkeys(["one", "two"], {"numbers": [1, 2.5], "text": "é"})
    assert journal.problem is None and journal.resumed == "2 steps and 0.0 MB of weights are there already"
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_it_goes_on_after_opening(folder: Path) -> None:
    journal = Journal(folder, KEY)
    graph(journal, "onnx/three")
    assert opened(folder) == (["a", "b", "c"], ["one", "two", "three"], None)


def test_what_no_record_names_is_removed_and_a_weight_file_is_cut(folder: Path) -> None:
    with (folder / "onnx/w.data").open("ab") as file:
        file.write(b"half of the next tensor")
    for name in ("onnx/half", "other/deep/half", "engines/x.engine"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    journal = Journal(folder, KEY, lambda name: name.endswith(".engine"))
    assert journal.problem is None
    assert (folder / "onnx/w.data").stat().st_size == 12288 + 2000
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    assert found == [JOURNAL, "engines", "engines/x.engine", "onnx", "onnx/one", "onnx/two", "onnx/w.data"]


def test_a_last_line_that_was_cut_off_is_no_damage(folder: Path) -> None:
    """A builder is killed while it writes a record: all before it stands."""
    data = (folder / JOURNAL).read_bytes()
    for cut in (1, 20, len(data.splitlines(keepends=True)[-1]) - 1):
        (folder / JOURNAL).write_bytes(data[:-cut])
        (folder / "onnx/two").write_text("graph onnx/two")
        assert opened(folder) == (["a", "b", "c"], ["one"], None)
        assert not (folder / "onnx/two").exists()


# ----------------------------------------------------------------------------------------------------------------- damage
def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("at", "tensors", "steps"),
    [
        (0, [], []), (4999, [], []), (5000, ["a"], []), (8191, ["a"], []), (8192, ["a"], []), (12287, ["a", "b"], ["one"]),
        (-1, ["a", "b"], ["one"]),
    ],
)  # fmt: skip
def test_a_flipped_byte_of_a_weight_file(folder: Path, at: int, tensors: list[str], steps: list[str]) -> None:
    """Bytes between two tensors count as well: the bundle's bytes are those of a build that nobody disturbed."""
    flip(folder / "onnx/w.data", at)
    assert opened(folder) == (tensors, steps, "onnx/w.data is not as it was written")
    assert opened(folder) == (tensors, steps, None)  # and it is gone


def test_a_weight_file_that_is_short_or_gone(folder: Path) -> None:
    with (folder / "onnx/w.data").open("ab") as file:
        file.truncate(12288 + 1999)
    assert opened(folder)[:2] == (["a", "b"], ["one"])
    (folder / "onnx/w.data").unlink()
    assert opened(folder) == ([], [], "onnx/w.data is not as it was written")


@pytest.mark.parametrize(("name", "steps"), [("onnx/one", []), ("onnx/two", ["one"])])
def test_a_step_whose_file_differs_or_is_gone(folder: Path, name: str, steps: list[str]) -> None:
    flip(folder / name, 0)
    tensors, found, problem = opened(folder)
    assert found == steps and problem == f"{name} is not as it was written" and "a" in tensors
    assert not (folder / name).exists()


def test_a_file_that_a_later_step_writes_anew(folder: Path) -> None:
    journal = Journal(folder, KEY)
    graph(journal, "onnx/one", "another")
    assert opened(folder) == (["a", "b", "c"], ["one", "two"], None)
    (folder / "onnx/one").write_text("graph onnx/one")  # as the first one wrote it: the last word counts
    assert opened(folder)[1] == []


@pytest.mark.parametrize("line", range(6))
def test_a_damaged_line(folder: Path, line: int) -> None:
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    flip(folder / JOURNAL, sum(map(len, lines[:line])) + 30)
    tensors, steps, problem = opened(folder)
    assert problem == f"line {line + 1} of its journal is damaged"
    assert (tensors, steps) == [([], []), ([], []), (["a"], []), (["a", "b"], []), (["a", "b"], ["one"]), (["a", "b", "c"], ["one"])][line]
    assert opened(folder) == (tensors, steps, None)


def test_lines_in_another_order_are_not_believed(folder: Path) -> None:
    """Each line is whole, but what it tells of is not there."""
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert opened(folder)[:2] == ([], [])


def test_the_journal_of_another_build(folder: Path) -> None:
    assert opened(folder, "b" * 64) == ([], [], "its journal is of another build")
    assert sorted(p.name for p in folder.rglob("*")) == [JOURNAL]


def test_a_journal_that_is_no_journal(folder: Path) -> None:
    (folder / JOURNAL).write_bytes(b"\x00\xff\n" * 3)
    assert opened(folder) == ([], [], "line 1 of its journal is damaged")
