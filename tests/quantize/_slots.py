"""Bundles with int8 slots, of scales that the test gives; `build` finds them on data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

__all__ = ["DATA", "KV", "TEXT_KV", "Scales", "build_coded", "given_scales", "peaks"]

Scales = dict[str, tuple[float, ...]]

DATA = "calibration: {images: pictures, prompts: prompts.jsonl}"
KV = f"{{kv: {{weights: int8}}, {DATA}}}"
TEXT_KV = "{kv: {weights: int8}, calibration: {prompts: prompts.jsonl}}"
"""The same without pictures."""


def peaks(model: Path, recipe: Path) -> Scales:
    """Scales that hold all that the reference makes of made-up conversations."""
    from tmc_export.plan.make import make_plan
    from tmc_export.plan.source import read_model_files
    from tmc_export.recipe import load_recipe
    from tmc_export.verify.record import answer, made_up_scripts
    from tmc_export.verify.reference import Reference

    files = read_model_files(model)
    plan, _ = make_plan(load_recipe(recipe), files)
    reference, top = Reference(model, plan, trace=True), dict[str, np.ndarray]()
    for script in made_up_scripts(model, plan, files):
        for turn in answer(reference, script, plan, 1).turns:
            for block in turn.expected.blocks:
                for kind, rows in (("key", block.keys), ("value", block.values)):
                    for layer, each in rows.items():
                        top[f"{layer}.{kind}"] = np.maximum(top.get(f"{layer}.{kind}", 0.0), np.abs(each).max((1, 2)))
    return {name: tuple((each / 127).tolist()) for name, each in top.items()}


@contextmanager
def given_scales(scales: Mapping[str, tuple[float, ...]] | None) -> Iterator[None]:
    """While active, calibration finds these scales, without data."""
    from tmc_export.api import bundling, calibrate
    from tmc_export.quantize.calibrated import Calibrated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundling, "samples_of", lambda recipe: [])
        patch.setattr(calibrate, "calibrate", lambda *given: Calibrated(slots=scales or {}))
        yield


def build_coded(recipe: Path, out: Path, scales: Mapping[str, tuple[float, ...]] | None, record: bool = False) -> Path:
    """Build a recipe with these scales."""
    from tmc_export.api.bundling import build_bundle

    with given_scales(scales):
        return build_bundle(recipe, out, record=record, engines=False, force=True).folder
