"""States that leave a graph and enter a later one: their names, and the static shapes that tracing finds out.

Legend: b batch, m pictures of the bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.plan.states import ENTERS, LEAVES

__all__ = ["Handed", "StateBook", "by_entry"]


@dataclass(frozen=True)
class Handed:
    """One state tensor: the recipe entry it belongs to, its name there, its static shape and type."""

    entry: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def output(self) -> str:
        """Its name as an output."""
        return f"{LEAVES}.{self.entry}.{self.name}"

    @property
    def input(self) -> str:
        """Its name as an input."""
        return f"{ENTERS}.{self.entry}.{self.name}"


@dataclass
class StateBook:
    """What one graph hands on; filled when its module runs, under a tracer or not.

    Attributes:
        entries: recipe entries whose state leaves.
        handed: what left, in the order of the outputs.
    """

    entries: tuple[int, ...] = ()
    handed: list[Handed] = field(default_factory=list)

    def output_names(self) -> list[str]:
        """Names of the outputs."""
        return [h.output for h in self.handed]

    def hand_on(self, states: Mapping[int, Mapping[str, Tensor]], items: Mapping[int, int]) -> list[Tensor]:
        """Write down and return the states that leave.

        Args:
            states: entry → what its last stage returned.
            items: entry → size that axis 0 must have: b, or b·m where every picture is an item.

        Raises:
            ExportError: a state has no batch axis.
        """
        self.handed.clear()
        found: list[Tensor] = []
        for entry in self.entries:
            for name, tensor in states.get(entry, {}).items():
                shape = tuple(int(size) for size in tensor.shape)
                if not shape or shape[0] != items[entry]:
                    raise ExportError(
                        f"the state '{name}' of compress.{entry} is {list(shape)}, its first axis must count the {items[entry]} item(s) of "
                        "the batch; mend the method's apply"
                    )
                self.handed.append(Handed(entry, name, shape, tensor.dtype))
                found.append(tensor.clone())  # an output of its own, also where a method hands on what it was handed
        return found


def by_entry(handed: Sequence[Handed], tensors: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """Sort the state inputs of a graph by recipe entry."""
    found: dict[int, dict[str, Tensor]] = {}
    for each, tensor in zip(handed, tensors, strict=True):
        found.setdefault(each.entry, {})[each.name] = tensor
    return found
