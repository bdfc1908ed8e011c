"""Learned weights that are not what the recipe says: one line, exit code 2, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests._learned import registered  # noqa: E402
from tests._tiny import RECIPE, listing, tmc, write_recipe  # noqa: E402

ENTRY = "  - {at: projector.replace, method: learned, into: encoder, weights: WEIGHTS}"


@pytest.fixture(autouse=True)
def _method() -> Iterator[None]:
    with registered():
        yield


def refused(place: Path, weights: str, *says: str, code: int = 2) -> None:
    lines = [ENTRY.replace("WEIGHTS", weights) if "fastv" in line else line for line in RECIPE.splitlines()]
    path = write_recipe(place, "\n".join([*lines, ""]))
    before = listing(place)
    for verb in (("build", path, "-o", place / "out", "-q"), ("plan", path)):
        ran = tmc(*verb)
        error = ran.error()
        assert ran.code == code and "recipe.yaml:6:" in error, error
        assert all(part in error for part in says), error
    assert listing(place) == before


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("{}", ("compress.0.weights: needs either a file or a seed and names neither",)),
        ("{file: w.safetensors, random: 0}", ("names both", "write file: x.safetensors or random: 0")),
        ("{random: 0, prefix: mm.}", ("random weights have no prefix, got 'mm.'",)),
        ("{random: -1}", ("compress.0.weights.random must be at least 0, got -1",)),
        ("{random: 99999999999}", ("compress.0.weights.random must be at most 4294967295",)),
        ("{random: yes}", ("compress.0.weights.random must be a whole number",)),
        ("{file: 7}", ("compress.0.weights.file must be text, got 7",)),
        ("{fil: w.safetensors}", ("unknown key 'fil' in compress.0.weights; did you mean 'file'", "allowed: file, prefix, random")),
        ("w.safetensors", ("compress.0.weights must be a mapping",)),
        ("null", ("has 4 learned tensors", "add weights: {file: x.safetensors")),
        ("{file: gone.safetensors}", ("there is no file", "gone.safetensors")),
        ("{file: ./model}", ("'model' is no safetensors file",)),
        ("{file: model/model.safetensors}", ("lacks 4 of the 4 tensors of method 'learned'",)),
        ("{file: ../model.safetensors}", ("there is no file",)),
    ],
)
def test_refused_before_anything_is_written(place: Path, weights: str, says: tuple[str, ...]) -> None:
    refused(place, weights, *says)


def test_a_pickle_is_not_opened(place: Path) -> None:
    (place / "mm_projector.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(place, "{file: mm_projector.bin}", "is no safetensors file; only those are read, never pickle")
    assert not Path("pwned").exists()


def test_a_file_cut_short(place: Path) -> None:
    data = (place / "model" / "model.safetensors").read_bytes()
    (place / "w.safetensors").write_bytes(data[: len(data) // 2])
    refused(place, "{file: w.safetensors}", "w.safetensors", "damaged or incomplete: fetch it again")
