"""Recorded conversations: inputs and what the reference answered, as `parity/*.npz` in the bundle. No torch, no pickle.

Arrays are named `<turn>.<what>`; `meta` holds the rest as JSON text. Writing is deterministic.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from tmc_export.core.errors import BundleError
from tmc_export.verify._trace import ReferenceTurn, StageTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["FOLDER", "Case", "CaseTurn", "read_cases", "write_case"]

FOLDER = "parity"
_STAGE = ("entry", "method", "at", "index", "picture", "candidates", "margin", "fragile")


@dataclass(frozen=True)
class CaseTurn:
    """One turn's inputs and the reference's answer.

    Attributes:
        pixels: per picture, the prepared input without a batch axis.
        buckets: per picture, the index of its bucket.
        ids: text ids, one image token per picture; from the second turn on beginning with the last token of the turn before.
        expected: what the reference answered; `blocks` is empty once it has been read back from a file.
        text: the user's text, which text towers read.
    """

    pixels: tuple[NDArray[np.float32], ...]
    buckets: tuple[int, ...]
    ids: tuple[int, ...]
    expected: ReferenceTurn
    text: str = ""


@dataclass(frozen=True)
class Case:
    """A conversation, by name."""

    name: str
    turns: tuple[CaseTurn, ...]


def write_case(folder: Path, case: Case) -> Path:
    """Write `<folder>/<name>.npz`; equal cases give equal bytes."""
    arrays: dict[str, Array] = {}
    meta: list[dict[str, object]] = []
    for number, turn in enumerate(case.turns):
        answer = turn.expected
        arrays |= {f"{number}.pixels.{i}": p for i, p in enumerate(turn.pixels)}
        arrays |= {f"{number}.vision.{i}": v for i, v in enumerate(answer.vision)}
        arrays |= {f"{number}.ids": np.array(turn.ids, np.int64), f"{number}.tokens": np.array(answer.tokens, np.int64)}
        arrays |= {f"{number}.logits": answer.logits, f"{number}.cache_rows": np.array(answer.cache_rows, np.int64)}
        for i, stage in enumerate(answer.stages):
            arrays |= {f"{number}.stage.{i}.kept": stage.kept, f"{number}.stage.{i}.source": stage.source}
            if stage.scores is not None:
                arrays[f"{number}.stage.{i}.scores"] = stage.scores
        stages = [{name: getattr(s, name) for name in _STAGE} for s in answer.stages]
        meta.append({"buckets": list(turn.buckets), "stages": stages, "text": turn.text})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.name}.npz"
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)
    return path


def read_cases(bundle: Path) -> Iterator[Case]:
    """Read every recorded conversation of a bundle, in the order of their names.

    Raises:
        BundleError: a file is damaged.
    """
    for path in sorted((bundle / FOLDER).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            meta = json.loads(str(arrays["meta"]))
            turns = tuple(_turn(arrays, number, entry) for number, entry in enumerate(meta))
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile, zlib.error) as error:
            raise BundleError(f"{path} cannot be read as a recorded conversation ({error}); build the bundle again") from error
        yield Case(path.stem, turns)


def _turn(arrays: Mapping[str, Array], number: int, entry: Mapping[str, Any]) -> CaseTurn:
    stages = []
    for i, facts in enumerate(entry["stages"]):
        prefix = f"{number}.stage.{i}"
        stages.append(
            StageTrace(
                kept=arrays[f"{prefix}.kept"],
                source=arrays[f"{prefix}.source"],
                scores=arrays.get(f"{prefix}.scores"),
                **{name: facts[name] for name in _STAGE},
            )
        )
    buckets = tuple(int(b) for b in entry["buckets"])
    pictures = range(len(buckets))
    answer = ReferenceTurn(
        tokens=tuple(int(t) for t in arrays[f"{number}.tokens"]),
        logits=arrays[f"{number}.logits"],
        vision=tuple(arrays[f"{number}.vision.{i}"] for i in pictures),
        stages=tuple(stages),
        blocks=(),
        cache_rows=tuple(int(r) for r in arrays[f"{number}.cache_rows"]),
    )
    pixels = tuple(arrays[f"{number}.pixels.{i}"] for i in pictures)
    return CaseTurn(pixels, buckets, tuple(int(t) for t in arrays[f"{number}.ids"]), answer, str(entry.get("text", "")))
