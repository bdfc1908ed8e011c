"""Fitting: what a method may ask of the uncompressed model, and what it answers.

Some options are found and not chosen: FitPrune's table of deletions, VTW's layer. `tmc-export fit` runs a few prompts with a picture
through the reference and calls `Method.fit`, which asks through `Evidence` for what it needs. The verb, and the room that runs the model,
know no method.

Legend: n candidates of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from tmc_export.graphs._contract import Need, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Evidence", "Fitted", "Option", "Visit"]

Option: TypeAlias = "int | float | str | tuple[int, ...]"
"""A value that a recipe can hold."""

Visit: TypeAlias = "Callable[[int, Stage, Mapping[Need, Tensor]], Tensor | None]"
"""Called with the prompt's number, the stage and its needs, each `[n]` of that one picture; returns the int64 indices of the candidates
that go on, ascending and at least one, or None for all of them."""


class Evidence(Protocol):
    """The model on calibration prompts, each with one picture; `fit` gets one. The entry that is fitted is left out of the recipe, all
    others stay."""

    @property
    def prompts(self) -> int:
        """How many prompts there are, at least 1."""
        ...

    def look(self, stages: Sequence[Stage], visit: Visit) -> None:
        """Run every prompt once and call `visit` at each stage, in the order of layers; what it drops, later layers don't see.

        Args:
            stages: at decoder sites from `decoder.1` on, in their order; their needs are attention of the layer before, after softmax, that
                is one row or a sum of rows.
            visit: see `Visit`.
        """
        ...

    def divergence(self, at: Site, options: Mapping[str, Option]) -> float:
        """Kullback-Leibler divergence, in nats, of the first answer token's distribution with the entry at `at` from the one without
        it, `KL(with || without)`, averaged over the prompts."""
        ...

    def operations(self, at: Site, options: Mapping[str, Option]) -> float:
        """The share of the decoder layers' operations in a full prefill that stays with the entry at `at`; cuts are not counted."""
        ...


@dataclass(frozen=True)
class Fitted:
    """What a fitting found.

    Attributes:
        at: the site to write.
        options: the options to write.
        columns, rows: the table to show.
    """

    at: Site
    options: Mapping[str, Option]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
