"""A build that is killed: its target is as before, the next build goes on where it stopped, and makes the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests._tiny import RECIPE, TEXT_ONLY, listing, save_tiny_model, write_recipe
from tests.api._killed import Ended, KilledBuilds
from tmc_export.api.resuming import step
from tmc_export.bundle.journal import JOURNAL, Journal
from tmc_export.bundle.program import GraphPhase, PhaseName
from tmc_export.bundle.read import check_files, open_manifest
from tmc_export.core.files import exchange
from tmc_export.surgery._states import Handed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="builds are killed in forks")
KILLED = -9


class Place:
    """A recipe, the undisturbed bundle of it, and builds that are killed."""

    def __init__(self, builds: KilledBuilds, recipe: Path, record: bool, folder: Path | None = None) -> None:
        self.builds, self.recipe, self.record = builds, recipe, record
        self.whole = (folder or recipe.parent) / "whole"
        self.first = builds.build(recipe, self.whole, here=True, trace=True, record=record)
        assert self.first.status == 0, self.first.error

    def build(self, out: Path, die: int | None = None, **more: Any) -> Ended:
        ended = self.builds.build(self.recipe, out, die, record=self.record, **more)
        assert ended.status == (0 if die is None else KILLED), ended.error or ended.events
        return ended

    def build_other(self, out: Path) -> Path:
        """Build another bundle of the same model into a folder."""
        self.build(out, overrides=["inputs.new_tokens=8"])
        return out

    def number(self, event: str, nth: int = 0) -> int:
        """Return the number of the nth event that opens with `event` in the undisturbed build."""
        return [i for i, e in enumerate(self.first.events) if e.startswith(event)][nth]


@pytest.fixture(scope="module")
def builds() -> Iterator[KilledBuilds]:
    with KilledBuilds() as made:
        yield made


@pytest.fixture(scope="module")
def place(builds: KilledBuilds, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("resume")
    save_tiny_model(folder / "model")
    return Place(builds, write_recipe(folder, TEXT_ONLY), record=False)


@pytest.fixture(scope="module")
def pictures(builds: KilledBuilds, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a picture and a cut: five subgraphs."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "model").symlink_to(place.recipe.parent / "model")
    return Place(builds, write_recipe(folder), record=False)


@pytest.fixture(scope="module")
def recorded(builds: KilledBuilds, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same with the reference's answers, for a board: its script rewrites graphs."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "model").symlink_to(place.recipe.parent / "model")
    text = RECIPE.replace("dtype: float32", "dtype: float16")
    return Place(
        builds, write_recipe(folder, text.replace("device: cpu, runtime: onnxruntime", "device: jetson-agx-orin-64gb")), record=True
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def remains(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f".{out.name}.*"))


def same(out: Path, place: Place) -> None:
    """Fail unless the bundle is whole, has the bytes of the undisturbed one, and nothing else is left."""
    check_files(out, open_manifest(out))
    assert bytes_of(out) == bytes_of(place.whole)
    assert remains(out) == []


def killed_and_resumed(place: Place, out: Path, die: int) -> Ended:
    """Kill a build before an event, look, and build again."""
    before = listing(out) if out.exists() else None
    place.build(out, die)
    last = place.first.events[die]
    if last == "renamed .part":
        assert (out / "manifest.json").is_file()  # all was done but the tidying up
    else:
        assert (listing(out) if out.exists() else None) == before, last
    again = place.build(out)
    same(out, place)
    return again


# ---------------------------------------------------------------------------------------------------------- killed anywhere
POINTS = [
    pytest.param("line export embed", 0, id="before the first subgraph", marks=pytest.mark.slow),
    pytest.param("append block_0.data", 2, id="in the middle of a tensor"),
    pytest.param("appended block_0.data", 3, id="after a tensor, before its record"),
    pytest.param("record weight", 4, id="in the middle of a record", marks=pytest.mark.slow),
    pytest.param("save block_0_decode", 0, id="in the middle of a graph"),
    pytest.param("line hash files", 0, id="when all is made"),
    pytest.param("rename .part", 0, id="before it is put in its place", marks=pytest.mark.slow),
    pytest.param("renamed .part", 0, id="when it is in its place"),
]


@pytest.mark.parametrize(("event", "nth"), POINTS)
def test_a_killed_build_goes_on(place: Place, tmp_path: Path, event: str, nth: int) -> None:
    die = place.number(event, nth)
    again = killed_and_resumed(place, tmp_path / "out", die)
    done = place.first.events[:die]
    if event == "renamed .part":
        assert again.events == []  # up to date
        return
    assert again.count("trace") == place.first.count("trace") - done.count("recorded step")  # what was finished is not traced again
    recorded = done.count("recorded weight")
    assert again.count("append") == place.first.count("append") - recorded  # nor is a tensor evaluated that had its record
    assert any("going on where an earlier build stopped" in e for e in again.events) == bool(recorded)


def full_disk(place: Place, out: Path, at: int) -> None:
    """Let the disk be full at an event: the error names the folder, and all is as before."""
    before = listing(out.parent)
    ended = place.builds.build(place.recipe, out, full=at, record=place.record)
    assert ended.status == 1 and f"No space left on device: '{out}'" in ended.error, (place.first.events[at], ended.error)
    assert listing(out.parent) == before, place.first.events[at]


@pytest.mark.parametrize("event", ["append block_0.data", "record weight", "save block_0_decode", "rename .part"])
def test_a_full_disk(place: Place, tmp_path: Path, event: str) -> None:
    full_disk(place, tmp_path / "out", place.number(event))


@pytest.mark.slow
def test_a_full_disk_at_many_writes(recorded: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recorded.build_other(out)  # a bundle that is to stay
    writes = [i for i, e in enumerate(recorded.first.events) if e.split()[0] in ("append", "record", "save", "answer")]
    for at in writes[::5]:
        full_disk(recorded, out, at)
    check_files(out, open_manifest(out))


@pytest.mark.slow
def test_killed_at_many_events(pictures: Place, tmp_path: Path) -> None:
    """Every seventh, so that over the subgraphs each kind is met."""
    for die in range(1, len(pictures.first.events), 7):
        killed_and_resumed(pictures, tmp_path / f"{die}", die)


@pytest.mark.slow
def test_a_process_that_traces_only_what_is_left_makes_the_same_graphs(pictures: Place, tmp_path: Path) -> None:
    pictures.build(tmp_path / "out", pictures.number("append block_1.data", 2))
    again = pictures.build(tmp_path / "out", trace=True)
    assert 0 < again.count("trace") < pictures.first.count("trace")
    same(tmp_path / "out", pictures)


@pytest.mark.slow
def test_killed_at_many_lines_with_answers_and_a_script(recorded: Place, tmp_path: Path) -> None:
    events = recorded.first.events
    for die in [i for i, e in enumerate(events) if e.startswith(("line", "answer"))][1::3]:
        again = killed_and_resumed(recorded, tmp_path / f"{die}", die)
        answered = sum(e.startswith("answered") for e in events[:die])
        assert again.count("answer") == recorded.first.count("answer") - answered, events[die]


@pytest.mark.slow
def test_states_that_graphs_hand_on_come_back(builds: KilledBuilds, repository: Path, tmp_path: Path) -> None:
    """MustDrop hands what the encoder found to the first cut, and that to the second: killed before each of them."""
    place = Place(builds, repository / "recipes" / "tiny-llava-mustdrop-fp32.yaml", record=False, folder=tmp_path)
    for cut in ("compress_1", "compress_2"):
        again = killed_and_resumed(place, tmp_path / cut, place.number(f"line export {cut}"))
        assert 0 < again.count("trace") < place.first.count("trace")


def test_what_a_step_found_out_comes_back(tmp_path: Path) -> None:
    """States by entry with their shapes and types, profiles, and how many weights a scheme has changed."""
    handed = {
        0: [Handed(0, "scores", (1, 9), torch.float16)],
        2: [Handed(2, "kept", (2, 3), torch.int64), Handed(2, "sum", (2,), torch.float32)],
    }
    counts = {"decoder": 7}

    def work(profiles: list[dict[str, object]], states: dict[int, list[Handed]], found: dict[str, int]) -> Any:
        schemes = SimpleNamespace(counts=lambda: found, restore=found.update)
        return SimpleNamespace(journal=Journal(tmp_path, "k"), profiles=profiles, handed=states, schemes=schemes, saved=[])

    made = {"prefill": GraphPhase(file="onnx/a.onnx", tokens=3), "decode": GraphPhase(file="onnx/b.onnx", tokens=1, past=9)}
    first = work([{"name": "a", "shapes": {"x": [1, 2]}}], handed, counts)
    assert step(first, "a", dict[PhaseName, GraphPhase], lambda: made) is made
    again = work([], {}, {"decoder": 0})
    assert step(again, "a", dict[PhaseName, GraphPhase], lambda: pytest.fail("it is made again")) == made
    assert again.handed == handed and again.profiles == first.profiles and again.schemes.counts() == counts
    with pytest.raises(pytest.fail.Exception):
        step(again, "b", dict[PhaseName, GraphPhase], lambda: pytest.fail("it is made"))


def test_a_build_that_calibrated_does_not_do_it_again(builds: KilledBuilds, place: Place, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(place.recipe.parent / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what is it"}\n{"prompt": "the one on the left"}\n')
    scheme = "{decoder: {weights: int4, block: 32, algorithm: gptq}, kv: {weights: int8}, calibration: {prompts: prompts.jsonl}}"
    calibrated = Place(builds, write_recipe(tmp_path, TEXT_ONLY.replace("quantize: {}", f"quantize: {scheme}")), record=False)
    assert calibrated.first.count("line") > 4 and any("gptq" in e for e in calibrated.first.events)
    again = killed_and_resumed(calibrated, tmp_path / "out", calibrated.number("append block_0.data"))
    assert not [e for e in again.events if "calibrate" in e or "gptq" in e]


@pytest.mark.slow
def test_killed_again_and_again(pictures: Place, tmp_path: Path) -> None:
    """Every build gets a little further; none begins anew."""
    out, kills = tmp_path / "out", 0
    while pictures.builds.build(pictures.recipe, out, 16, record=False).status == KILLED:
        kills += 1
        assert not out.exists() and kills < 200
    assert kills > 3
    same(out, pictures)


def test_the_bundle_that_was_there_stays_until_the_end(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = bytes_of(place.build_other(out))
    place.build(out, place.number("append block_0.data"))
    assert bytes_of(out) == before
    check_files(out, open_manifest(out))
    (left,) = remains(out)
    old = place.build(out, overrides=["inputs.new_tokens=8"])  # is up to date, and what the killed one left is of no use
    assert old.events == [] and not left.exists() and bytes_of(out) == before


@pytest.mark.slow
def test_killed_when_two_bundles_change_places(place: Place, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two folders")
    out = tmp_path / "out"
    before = bytes_of(place.build_other(out))
    for event in ("exchange", "exchanged"):
        place.build_other(out)
        ended = place.builds.build(place.recipe, out, len(place.first.events) - 3 + (event == "exchanged"), record=False)
        assert (ended.status, ended.events[-1]) == (KILLED, event)
        assert bytes_of(out) == before if event == "exchange" else (out / JOURNAL).is_file()
        assert (not place.build(out).events) == (event == "exchanged")
        same(out, place)


# -------------------------------------------------------------------------------------------------------- what is believed
def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = [
    pytest.param("onnx/block_0.data", 100, "onnx/block_0.data is not as it was written", id="a tensor"),
    pytest.param("onnx/embed_decode.onnx", 50, "onnx/embed_decode.onnx is not as it was written", id="a graph"),
    pytest.param(JOURNAL, 400, "its journal is damaged", id="the journal"),
]


@pytest.mark.parametrize(("name", "at", "says"), DAMAGE)
def test_damaged_work_is_noticed_and_done_again(place: Place, tmp_path: Path, name: str, at: int, says: str) -> None:
    out = tmp_path / "out"
    place.build(out, place.number("line hash files"))
    (left,) = remains(out)
    flip(left / name, at)
    again = place.build(out)
    assert any(says in e for e in again.events), again.events
    assert 0 < again.count("trace") <= place.first.count("trace")
    same(out, place)


def test_work_for_another_bundle_is_removed(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    place.build(out, place.number("line hash files"))
    (left,) = remains(out)
    other = place.build(out, overrides=["inputs.new_tokens=8"])
    assert not left.exists() and remains(out) == []
    assert other.count("trace") == place.first.count("trace")
    assert not any("going on" in e for e in other.events)
    assert bytes_of(out) != bytes_of(place.whole)
