"""Recorded conversations: what is read is what was written, byte for byte the same every time; damage is one clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tmc_export.core.errors import BundleError
from tmc_export.verify._trace import ReferenceTurn, StageTrace
from tmc_export.verify.recorded import FOLDER, Case, CaseTurn, read_cases, write_case


def conversation(name: str = "one") -> Case:
    draw = np.random.default_rng(0)
    stage = StageTrace(
        entry=0,
        method="fastv",
        at="decoder.2",
        index=0,
        picture=1,
        candidates=4,
        kept=np.array([0, 3]),
        source=np.array([0, 3]),
        scores=np.array([4, 1, 2, 3], np.float32),
        margin=0.25,
        fragile=False,
    )
    synthetic = StageTrace(1, "visionzip", "encoder", 0, 2, 4, np.array([1, -1]), np.array([1, -1]), None, None, True)

    def answered(stages: tuple[StageTrace, ...], pictures: int) -> ReferenceTurn:
        vision = tuple(draw.normal(size=(4, 8)).astype(np.float32) for _ in range(pictures))
        return ReferenceTurn((5, 6), draw.normal(size=(2, 11)).astype(np.float32), vision, stages, (), (9, 7))

    pictures = tuple(draw.normal(size=s).astype(np.float32) for s in ((3, 4, 6), (24, 3)))
    first = CaseTurn(pictures, (1, 0), (1, 4, 4, 2), answered((stage, synthetic), 2))
    return Case(name, (first, CaseTurn((), (), (6, 2), answered((), 0))))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    wanted = conversation()
    write_case(tmp_path / FOLDER, wanted)
    write_case(tmp_path / FOLDER, conversation("another"))
    found = list(read_cases(tmp_path))
    assert [c.name for c in found] == ["another", "one"]
    for got, want in zip(found[1].turns, wanted.turns, strict=True):
        assert (got.buckets, got.ids) == (want.buckets, want.ids)
        for one, other in zip(got.pixels, want.pixels, strict=True):
            np.testing.assert_array_equal(one, other)
        a, b = got.expected, want.expected
        assert (a.tokens, a.cache_rows) == (b.tokens, b.cache_rows)
        np.testing.assert_array_equal(a.logits, b.logits)
        assert a.logits.dtype == np.float32
        for mine, theirs in zip(a.stages, b.stages, strict=True):
            assert (mine.method, mine.at, mine.picture, mine.margin, mine.fragile) == (
                theirs.method, theirs.at, theirs.picture, theirs.margin, theirs.fragile,
            )  # fmt: skip
            np.testing.assert_array_equal(mine.kept, theirs.kept)
            np.testing.assert_array_equal(mine.source, theirs.source)
            assert (mine.scores is None) == (theirs.scores is None)


def test_equal_conversations_give_equal_bytes(tmp_path: Path) -> None:
    one, two = write_case(tmp_path / "a", conversation()), write_case(tmp_path / "b", conversation())
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("size", [0, 100, -50, None])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, size: int | None) -> None:
    path = write_case(tmp_path / FOLDER, conversation())
    data = bytearray(path.read_bytes())
    if size is None:
        data[200] ^= 0xFF  # inside the first compressed array
    path.write_bytes(data[:size])
    with pytest.raises(BundleError, match=r"one\.npz cannot be read as a recorded conversation"):
        list(read_cases(tmp_path))


def test_a_missing_array_is_one_clear_error(tmp_path: Path) -> None:
    path = write_case(tmp_path / FOLDER, conversation())
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files if name != "1.logits"}
    np.savez(path, **arrays)
    with pytest.raises(BundleError, match=r"1\.logits"):
        list(read_cases(tmp_path))


def test_a_bundle_without_recordings_has_none(tmp_path: Path) -> None:
    assert list(read_cases(tmp_path)) == []
