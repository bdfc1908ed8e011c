"""Plans and reports as JSON data: what `tmc-export plan --json` prints and what a bundle's manifest records."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from tmc_export.plan.estimate import LABEL
from tmc_export.plan.make import PlanReport
from tmc_export.plan.types import Plan

if TYPE_CHECKING:
    from pydantic import JsonValue

__all__ = ["SCHEMA", "plan_json", "report_json"]

SCHEMA = 1
"""Version of what `report_json` returns."""


def _plain(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if callable(dump) else str(value)


def plan_json(plan: Plan) -> dict[str, JsonValue]:
    """Return a plan as JSON data; configurations and budgets are written as in a recipe."""
    data = asdict(plan)
    for tower in data["towers"]:
        del tower["path"]  # of this machine
    for place in (*data["vision"], *data["cuts"]):
        for stage in place["stages"]:
            if stage["weights"] is not None:
                del stage["weights"]["path"]  # of this machine
    result: dict[str, JsonValue] = json.loads(json.dumps(data, default=_plain))
    return result


def report_json(report: PlanReport) -> dict[str, JsonValue]:
    """Return everything a report says as JSON data: bytes, operations (a multiply-add is two) and seconds."""
    cost, full = report.cost, report.uncompressed_cost
    room = report.room
    data = {
        "schema": SCHEMA,
        "name": report.plan.name,
        "device": report.device.name,
        "runtime": report.recipe.target.runtime,
        "plan": plan_json(report.plan),
        "splits": list(report.splits),
        "memory": {
            "device": None if room is None else {**asdict(room), "free": room.free},
            "run": {**asdict(report.run), "total": report.run.total},
            "build": [asdict(engine) for engine in report.build],
            "built_on_device": report.builds_here,
            "builder": None if report.builder is None else {**asdict(report.builder.room), "free": report.builder.room.free},
        },
        "estimate": {
            "label": LABEL,
            "unverified": list(report.clock.unverified),
            "no_times": report.clock.why_not or None,
            **asdict(cost),
            "uncompressed": None if full is None else asdict(full),
            "no_uncompressed": report.why_not or None,
            "speedup": None if full is None else {
                "first_token": _ratio(full.first_token_s, cost.first_token_s),
                "token": _ratio(full.token_s, cost.token_s),
                "answer": _ratio(full.answer_s, cost.answer_s),
                "prompt_operations": full.prompt_flops / cost.prompt_flops,
            },
            "amdahl": None if report.amdahl is None else asdict(report.amdahl),
        },
        "notes": list(report.notes),
    }  # fmt: skip
    result: dict[str, JsonValue] = json.loads(json.dumps(data))
    return result


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before / after
