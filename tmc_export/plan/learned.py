"""Learned weights of methods: what an entry of the recipe must say, and whether its file holds what the method declares.

Only the header of a safetensors file is read here, by its published layout (eight bytes of length, then JSON), so that a plan needs neither
torch nor the `safetensors` package, and nothing of the weights themselves.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from tmc_export.core.errors import LegalityError, ModelError, RecipeError
from tmc_export.core.facts import ModelFacts
from tmc_export.plan.entries import Entry
from tmc_export.plan.types import LearnedWeights

__all__ = ["bind", "read_header"]

Held = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → dtype and shape, as a header says."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_HEADER_LIMIT = 100_000_000
_SHOWN = 3


def bind(entry: Entry, facts: ModelFacts) -> LearnedWeights | None:
    """Return an entry's learned weights for a place with these facts, None when its method has none there.

    Raises:
        RecipeError: weights are needed and not named, or named and not needed.
        LegalityError: the method refuses its options.
        ModelError: the file is missing, damaged, or holds other tensors than the method declares.
    """
    try:
        shapes = {name: tuple(shape) for name, shape in entry.method.weights(entry.config, facts).items()}
    except ValueError as error:
        raise LegalityError(f"{entry.origin()}: method '{entry.name}': {error}") from error
    written = entry.weights
    if written is None:
        if shapes:
            raise RecipeError(
                f"{entry.origin()}: method '{entry.name}' has {len(shapes)} learned tensors, such as '{next(iter(shapes))}', and the entry "
                "names no weights; add weights: {file: x.safetensors, prefix: ''}, or weights: {random: 0} to try it without a checkpoint"
            )
        return None
    if not shapes:
        options = "" if entry.method.training_free else " with these options"
        raise RecipeError(f"{entry.origin('weights')}: method '{entry.name}' has no learned weights{options}; remove the key")
    if written.file is None or entry.weights_path is None:
        return LearnedWeights(shapes, random=written.random)
    place = f"{entry.origin('weights', 'file')}: weights"
    check_tensors(place, entry.name, entry.weights_path, written.prefix, shapes)
    return LearnedWeights(shapes, file=written.file, prefix=written.prefix, path=entry.weights_path)


def check_tensors(place: str, method: str, path: Path, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a file's header with what a method declares; more tensors than declared are fine.

    Raises:
        ModelError: the file cannot be read, or tensors are missing or of another shape or dtype.
    """
    if path.suffix != ".safetensors":
        raise ModelError(f"{place}: '{path.name}' is no safetensors file; only those are read, never pickle: convert it to x.safetensors")
    held = read_header(path, place)
    lost = [name for name in shapes if prefix + name not in held]
    if lost:
        raise ModelError(
            f"{place}: {path.name} lacks {len(lost)} of the {len(shapes)} tensors of method '{method}'"
            f"{f' under the prefix {prefix!r}' if prefix else ''}: {_near(lost, prefix, held)}; {_hint(shapes, prefix, held)}"
        )
    other = [name for name, shape in shapes.items() if held[prefix + name][1] != shape]
    if other:
        listed = ", ".join(f"'{n}' is {list(held[prefix + n][1])}, needed is {list(shapes[n])}" for n in other[:_SHOWN])
        raise ModelError(
            f"{place}: {path.name} holds {len(other)} of the {len(shapes)} tensors of method '{method}' in another shape: {listed}"
            f"{_more(other)}; set the options that the weights were trained with, or give the weights of these options and this model"
        )
    kinds = [name for name in shapes if held[prefix + name][0] not in _BYTES]
    if kinds:
        listed = ", ".join(f"'{n}' is {held[prefix + n][0]}" for n in kinds[:_SHOWN])
        raise ModelError(
            f"{place}: {path.name} holds {len(kinds)} tensors of method '{method}' that are no floating-point numbers: {listed}"
            f"{_more(kinds)}; give weights in {', '.join(_BYTES)}"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def _near(lost: list[str], prefix: str, held: Held) -> str:
    """List missing names, each with the nearest one that the file has."""
    found = []
    for name in lost[:_SHOWN]:
        close = difflib.get_close_matches(prefix + name, list(held), n=1, cutoff=0.6)
        found.append(f"'{name}'" + (f" (nearest: '{close[0]}')" if close else ""))
    return ", ".join(found) + _more(lost)


def _hint(shapes: Mapping[str, tuple[int, ...]], prefix: str, held: Held) -> str:
    """Say which prefix would find every tensor, if one does."""
    first = next(iter(shapes))
    for key in held:
        begin = key.removesuffix(first)
        if key.endswith(first) and begin != prefix and all(begin + name in held for name in shapes):
            return f"write prefix: '{begin}'" if begin else "remove the prefix"
    return f"correct the prefix, or give a file with the method's weights; this one begins with '{next(iter(held), '')}'"


# -------------------------------------------------------------------------------------------------------------- header
def read_header(path: Path, place: str) -> Held:
    """Read what a safetensors file holds.

    Args:
        path: the file.
        place: begins every message.

    Raises:
        ModelError: there is no such file, or its header is damaged or promises other bytes than the file has.
    """
    if not path.is_file():
        raise ModelError(f"{place}: there is no file {path}; the path is relative to the recipe file")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size - 8
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size, _HEADER_LIMIT):
                raise ValueError(f"its header is said to have {length} bytes, the file has {max(size, 0)} behind the first 8")
            return _held(json.loads(file.read(length)), size - length)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{place}: cannot read {path}: {reason}; the file is damaged or incomplete: fetch it again") from error


def _held(header: dict[str, dict[str, object]], size: int) -> Held:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"tensor '{name}' has no shape")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
            raise ValueError(f"tensor '{name}' has no place")
        begin, end = offsets
        if not 0 <= begin <= end <= size:
            raise ValueError(f"tensor '{name}' lies at bytes {begin} to {end} of {size}")
        wide = _BYTES.get(kind, _OTHER_BYTES.get(kind))
        if wide is not None and end - begin != prod(shape) * wide:
            raise ValueError(f"tensor '{name}' of {kind} {shape} has {end - begin} bytes")
        found[name] = (kind, tuple(shape))
    return found
