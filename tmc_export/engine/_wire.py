"""Jobs and reports as JSON: what crosses between the command and the process that builds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tmc_export.engine._build import Job
from tmc_export.engine.options import EngineOptions, EngineReport, LayerInfo, Profile

__all__ = ["job_from_json", "job_to_json", "profiles_from", "report_fields", "report_from"]


def profiles_from(items: Any) -> tuple[Profile, ...]:
    """Read profiles as profiles.json writes them; raises `KeyError`, `TypeError` or `ValueError` on another form."""
    made = []
    for item in items:
        shapes = tuple((str(name), tuple(int(size) for size in dims)) for name, dims in dict(item["shapes"]).items())
        made.append(Profile(str(item["name"]), shapes))
    return tuple(made)


def _profile_fields(profile: Profile) -> dict[str, object]:
    return {"name": profile.name, "shapes": {name: list(dims) for name, dims in profile.shapes}}


def job_to_json(job: Job) -> str:
    """Write a job on one line."""
    options = {**asdict(job.options), "timing_cache": str(job.options.timing_cache) if job.options.timing_cache else None}
    fields = {
        "name": job.name,
        "onnx": str(job.onnx),
        "out": str(job.out),
        "profiles": [_profile_fields(profile) for profile in job.profiles],
        "options": options,
    }
    return json.dumps(fields)


def job_from_json(text: str) -> Job:
    """Read what `job_to_json` wrote."""
    fields = json.loads(text)
    options = fields["options"]
    options["capabilities"] = tuple(options["capabilities"])
    options["timing_cache"] = Path(options["timing_cache"]) if options["timing_cache"] else None
    return Job(fields["name"], Path(fields["onnx"]), profiles_from(fields["profiles"]), Path(fields["out"]), EngineOptions(**options))


def report_fields(report: EngineReport) -> dict[str, object]:
    """Return a report as JSON takes it."""
    return {**asdict(report), "path": str(report.path)}


def report_from(fields: dict[str, Any]) -> EngineReport:
    """Read what `report_fields` wrote."""
    lists = ("capabilities", "activation_bytes", "profiles", "warnings")
    layers = tuple(LayerInfo(str(item["name"]), str(item["kind"]), tuple(item.get("constants", ()))) for item in fields["layers"])
    plain = {name: tuple(fields[name]) for name in lists}
    return EngineReport(**{**fields, **plain, "layers": layers, "path": Path(fields["path"])})
