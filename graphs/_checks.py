"""Refusals the methods share; every one says what was asked, what arrives and how to put it right."""

from __future__ import annotations

from typing import Literal

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Budget, Layout, Positions, Segment, Site

__all__ = ["kept_of", "need_class_token", "need_grid", "need_raster_encoder", "need_site", "selected"]


def kept_of(keep: Budget, arriving: int, at: Site, rounding: Literal["half_even", "floor", "ceil"] = "half_even") -> int:
    """Return how many of `arriving` tokens stay at `at`; raises `ValueError` when that is none or more than arrive.

    >>> kept_of(Budget.parse("50%"), 143, Site.parse("decoder.2"))
    72
    """
    k = keep.of(arriving, rounding)
    if k > arriving:
        raise ValueError(f"keep: {keep} is more than the {arriving} visual tokens that arrive at {at}; lower keep to at most {arriving}")
    if k < 1:
        raise ValueError(f"keep: {keep} of the {arriving} visual tokens that arrive at {at} leaves none; raise keep")
    return k


def selected(layout: Layout, k: int, positions: Positions = "keep") -> Layout:
    """Return the layout of `k` tokens picked from `layout`: one visual run, no raster any more."""
    return Layout((Segment("visual", k),), layout.width, positions)


def need_site(method: str, at: Site, *parts: str) -> None:
    """Raise `ValueError` unless `at` is one of `parts`, written as sites without their layer number (`"encoder.mid"`)."""
    form = ".".join(p for p in (at.part, at.point) if p is not None)
    if form not in parts:
        forms = ", ".join(parts)
        raise ValueError(f"{method} does not act at {at}; its sites are {forms} (layer numbers left out)")


def need_class_token(method: str, facts: ModelFacts) -> None:
    """Raise `ValueError` unless the encoder has one class token."""
    if facts.encoder.class_tokens != 1:
        raise ValueError(
            f"{method} scores by the attention of one class token, and the encoder of {facts.architecture} has "
            f"{facts.encoder.class_tokens}; "
            "choose a method that needs none, such as pool at projector or fastv at decoder.2"
        )


def need_raster_encoder(method: str, at: Site, facts: ModelFacts) -> None:
    """Raise `ValueError` when the projector joins neighbouring patches, so that single patches must not go missing before it."""
    if at.part == "encoder" and facts.encoder.merge > 1:
        side = facts.encoder.merge
        raise ValueError(
            f"{method} at {at} would take patches out of the {side}x{side} groups that the projector of {facts.architecture} joins; "
            "use at: projector, or a decoder site"
        )


def need_grid(method: str, layout: Layout, at: Site) -> tuple[int, int]:
    """Return the raster of the visual tokens; raises `ValueError` when they form none any more."""
    if layout.grid is None:
        raise ValueError(
            f"{method} needs a raster of visual tokens at {at}, and an earlier cut left {layout.tokens} without one; put {method} first"
        )
    return layout.grid
