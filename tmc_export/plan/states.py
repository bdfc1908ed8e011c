"""Which recipe entries hand a state from one graph to another: from the vision graph to a cut, from a cut to a later one.

An entry whose next stage runs in another graph hands on what its last stage here returned in `Compressed.state`; stages of other entries
in between do not matter. A state leaves as the output `state.<entry>.<name>` and enters as the input `past_state.<entry>.<name>`: a graph
may have both.
"""

from __future__ import annotations

from collections.abc import Iterable

from tmc_export.plan.types import CutPlan, Plan, StagePlan

__all__ = ["ENTERS", "LEAVES", "entering", "leaving_cut", "leaving_vision"]

LEAVES, ENTERS = "state", "past_state"


def _entries(stages: Iterable[StagePlan]) -> set[int]:
    return {s.entry for s in stages}


def _seen(plan: Plan) -> set[int]:
    return _entries(s for v in plan.vision for s in v.stages)


def leaving_vision(plan: Plan) -> tuple[int, ...]:
    """Return the entries with stages in the vision graph and at cuts."""
    return tuple(sorted(_seen(plan) & _entries(s for c in plan.cuts for s in c.stages)))


def leaving_cut(plan: Plan, cut: CutPlan) -> tuple[int, ...]:
    """Return the entries with stages at this cut and at later ones."""
    later = _entries(s for c in plan.cuts if c.before_block > cut.before_block for s in c.stages)
    return tuple(sorted(_entries(cut.stages) & later))


def entering(plan: Plan, cut: CutPlan) -> tuple[int, ...]:
    """Return the entries with stages at this cut and before it, in the vision graph or at cuts."""
    earlier = _entries(s for c in plan.cuts if c.before_block < cut.before_block for s in c.stages)
    return tuple(sorted(_entries(cut.stages) & (earlier | _seen(plan))))
