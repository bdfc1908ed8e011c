"""What calibration found lies in the folder of the build until the bundle is done, so that two builders never mix two findings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tmc_export.api.calibration_stored import calibrated_once
from tmc_export.bundle.journal import FOR_THE_NEXT, Journal
from tmc_export.quantize.calibrated import Calibrated

RNG = np.random.default_rng(0)
SHARED = RNG.random(4, np.float32)
FOUND = Calibrated(
    clips={"a": 1 / 3, "b": 2.5e-7},
    divisors={"a": SHARED, "b": SHARED},
    codes={"c": (RNG.integers(-8, 8, (64, 3), np.int8), RNG.random((2, 3), np.float32))},
    slots={"0.key": (0.1, 0.2), "0.value": (0.3, 0.4)},
    digest="d" * 64,
    samples=3,
)


def found(place: Path) -> Calibrated:
    """As GPTQ does: codes are mapped from a file in the folder."""
    codes, scales = FOUND.codes["c"]
    np.save(place / "gptq-0.npy", codes)
    return Calibrated(
        FOUND.clips, FOUND.divisors, {"c": (np.load(place / "gptq-0.npy", mmap_mode="r"), scales)}, FOUND.slots, FOUND.digest, 3
    )


def never(place: Path) -> Calibrated:
    pytest.fail("calibrates again")


def same(one: Calibrated) -> None:
    assert (one.clips, one.slots, one.digest, one.samples) == (FOUND.clips, FOUND.slots, FOUND.digest, FOUND.samples)
    assert one.divisors["a"] is one.divisors["b"]  # linears that read one input have one array
    for mine, theirs in [(one.divisors["a"], SHARED), *zip(one.codes["c"], FOUND.codes["c"], strict=True)]:
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)


def test_it_comes_back_in_a_new_builder(tmp_path: Path) -> None:
    same(calibrated_once(Journal(tmp_path, "k"), found))
    assert sorted(p.name for p in (tmp_path / FOR_THE_NEXT).iterdir()) == ["array-0.npy", "array-2.npy", "gptq-0.npy"]  # none of them twice
    same(calibrated_once(Journal(tmp_path, "k"), never))


def test_a_damaged_finding_is_found_anew_and_what_came_after_it_is_not_believed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "k")
    calibrated_once(journal, found)
    (tmp_path / "graph").write_text("made with it")
    journal.finish("graph", ["graph"], None)
    path = tmp_path / FOR_THE_NEXT / "gptq-0.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    again = Journal(tmp_path, "k")
    assert not again.steps and not (tmp_path / "graph").exists() and again.problem is not None and "gptq-0.npy" in again.problem
    same(calibrated_once(again, found))


def test_a_calibration_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    def cut_off(place: Path) -> Calibrated:
        found(place)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated_once(Journal(tmp_path, "k"), cut_off)
    journal = Journal(tmp_path, "k")
    assert not (tmp_path / FOR_THE_NEXT).exists()
    same(calibrated_once(journal, found))
