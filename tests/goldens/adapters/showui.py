"""ShowUI: not covered, and why."""

from __future__ import annotations

from tests.goldens._cases import Case, NotCovered, Program


def build(case: Case) -> Program:
    if "patches" in case.inputs:
        raise NotCovered(
            "connected components of raw pixel patches, which ShowUI finds in its image processor; of the issue for applications"
        )
    raise NotCovered(
        "tokens that bypass decoder layers and are not removed, which no stage of the contract does; of the issue for applications"
    )
