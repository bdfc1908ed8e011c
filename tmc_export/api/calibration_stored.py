"""What a calibration found, kept in the folder of the build: one that is killed does not calibrate again, and never mixes two findings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.journal import FOR_THE_NEXT, Journal
from tmc_export.quantize.calibrated import Calibrated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["calibrated_once"]

_STEP = "calibration"


def calibrated_once(journal: Journal, calibrate: Callable[[Path], Calibrated]) -> Calibrated:
    """Take what the journal says that calibration found, or calibrate and record it.

    Args:
        journal: of the build; its key says the data and the recipe.
        calibrate: given a folder for what is too large for memory.

    Returns:
        What was found; its larger arrays are mapped from files that stay until the bundle is done.
    """
    if _STEP not in journal.steps:
        place = journal.folder / FOR_THE_NEXT
        place.mkdir()
        value, files = _write(calibrate(place), place)
        journal.finish(_STEP, [f"{FOR_THE_NEXT}/{name}" for name in files], value)
    return _read(journal.steps[_STEP], journal.folder / FOR_THE_NEXT)


def _write(found: Calibrated, place: Path) -> tuple[dict[str, Any], list[str]]:
    """Write the arrays, each once; returns the rest as JSON, with the arrays' files, and those files."""
    files: dict[int, str] = {}

    def file_of(array: Array) -> str:
        if id(array) not in files:
            there = _file(array, place)
            files[id(array)] = there or f"array-{len(files)}.npy"
            if there is None:
                np.save(place / files[id(array)], array, allow_pickle=False)
        return files[id(array)]

    value = {
        "clips": dict(found.clips),
        "divisors": {name: file_of(array) for name, array in found.divisors.items()},
        "codes": {name: [file_of(array) for array in pair] for name, pair in found.codes.items()},
        "slots": {name: list(scales) for name, scales in found.slots.items()},
        "digest": found.digest,
        "samples": found.samples,
    }
    return value, list(files.values())


def _file(array: Array, place: Path) -> str | None:
    """Name of the file in `place` that an array is mapped from; None when it is not."""
    path = Path(array.filename) if isinstance(array, np.memmap) and array.filename is not None else None
    return path.name if path is not None and path.parent == place.resolve() else None


def _read(value: dict[str, Any], place: Path) -> Calibrated:
    arrays: dict[str, Array] = {}

    def array_of(file: str) -> Array:
        if file not in arrays:
            arrays[file] = np.load(place / file, mmap_mode="r", allow_pickle=False)
        return arrays[file]

    return Calibrated(
        {name: float(clip) for name, clip in value["clips"].items()},
        {name: array_of(file) for name, file in value["divisors"].items()},
        {name: (array_of(codes), array_of(scales)) for name, (codes, scales) in value["codes"].items()},
        {name: tuple(scales) for name, scales in value["slots"].items()},
        value["digest"],
        value["samples"],
    )
