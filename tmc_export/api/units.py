"""What can be quantized, or kept, by itself: parts, layers or single linears, each with the words that `keep` names it by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tmc_export.api.simulation import SLOTS, Simulation, Target
from tmc_export.quantize._weights import is_kept

__all__ = ["By", "Unit", "units_of"]

By = Literal["part", "layer", "linear"]

_LAYER = re.compile(r"(?:^|\.)((?:layers|blocks|layer|h)\.\d+)(?=\.)")


@dataclass(frozen=True)
class Unit:
    """Some weights of one part.

    Attributes:
        part: of the recipe's `quantize`.
        label: what of the part; empty: all of it.
        names: of the weights.
        words: what `quantize.<part>.keep` names them by, them and no others; empty: they cannot be kept (the KV slots).
    """

    part: str
    label: str
    names: tuple[str, ...]
    words: tuple[str, ...]


def units_of(simulation: Simulation, by: By) -> list[Unit]:
    """Divide what a plan rounds.

    Args:
        simulation: of the plan.
        by: `part`; `layer`: the numbered layers of encoder and decoder, each of their other weights, projector and head; `linear`: each.

    Returns:
        Every rounded weight in one unit, in the order in which they run; the slots are one more, whatever `by` says.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for target in simulation.targets.values():
        groups.setdefault((target.part, _label(target, by)), []).append(target.name)
    found = [Unit(part, label, tuple(names), _words(simulation.targets, part, names)) for (part, label), names in groups.items()]
    return [*found, *([Unit("kv", "", (SLOTS,), ())] if simulation.slots else [])]


def _label(target: Target, by: By) -> str:
    if by == "part":
        return ""
    stem = target.name.removesuffix(".weight")
    layer = _LAYER.search(target.name)
    if by == "linear":
        return stem if layer is None else stem[layer.start(1) :]
    if layer is not None:
        return layer.group(1)
    return "" if target.part in ("projector", "head") else stem.split(".")[-1]


def _words(targets: Mapping[str, Target], part: str, names: list[str]) -> tuple[str, ...]:
    """The fewest words found that keep these weights, and none of the part's others."""
    mine, others = set(names), {t.name for t in targets.values() if t.part == part} - set(names)

    def serves(word: str, wanted: set[str]) -> bool:
        return all(is_kept(n, (word,)) for n in wanted) and not any(is_kept(n, (word,)) for n in others)

    layers = {m.group(1) for n in names if (m := _LAYER.search(n)) is not None}
    if len(layers) == 1 and serves(word := layers.pop(), mine):
        return (word,)
    found = []
    for name in names:
        words = name.removesuffix(".weight").split(".")
        tails = [".".join(words[-length:]) for length in range(1, len(words) + 1)]
        found.append(next((tail for tail in tails if serves(tail, {name})), tails[-1]))
    return tuple(dict.fromkeys(found))
