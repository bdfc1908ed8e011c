"""Blocks cut for the memory of the machine that builds: the manifest says for which, and the answers are the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from tests._tiny import TEXT_ONLY, save_tiny_model, write_recipe  # noqa: E402
from tmc_export.api import build, bundling  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.bundle.write import seal  # noqa: E402
from tmc_export.plan._weights import block_bytes  # noqa: E402
from tmc_export.plan.building import peak_of_build  # noqa: E402
from tmc_export.plan.describe import plan_json  # noqa: E402
from tmc_export.plan.make import make_plan  # noqa: E402
from tmc_export.plan.memory import GIB  # noqa: E402
from tmc_export.plan.source import read_model_files  # noqa: E402
from tmc_export.recipe import Recipe, load_recipe  # noqa: E402
from tmc_export.verify.ladder import recorded_ladder  # noqa: E402

ENGINES = TEXT_ONLY.replace("{device: cpu, runtime: onnxruntime}", "{device: rtx-4090, runtime: tensorrt-rtx}")


def edges(manifest: object) -> list[tuple[int, int]]:
    return [(b.first, b.last) for b in manifest.program.blocks]  # type: ignore[attr-defined]


def test_a_small_machine_gets_more_blocks_and_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    path, files = write_recipe(tmp_path, ENGINES), read_model_files(tmp_path / "model")
    plan, splits = make_plan(load_recipe(path), files)
    (whole,) = plan.blocks
    assert splits == () and (whole.first, whole.last) == (0, 2)
    # room for the weights of one layer and the head, and not for those of both layers
    room = peak_of_build(block_bytes(plan, whole) - 64, None)
    small = (2 * GIB + room) / GIB
    monkeypatch.setattr(bundling, "for_this_builder", lambda recipe: recipe.with_build_memory(small))
    monkeypatch.setattr(bundling, "prove", lambda *_: {})  # engines of these graphs are built in tests/engine
    made = build(path, tmp_path / "bundle", engines=True).manifest
    assert edges(made) == [(0, 1), (1, 2)]
    assert made.proofs["onnxruntime end to end"].startswith("passed")
    again = Recipe.model_validate_json(json.dumps(made.recipe))
    assert again.target.build_memory_gib == small
    assert plan_json(make_plan(again, files)[0]) == made.plan, "any machine plans this bundle again"

    weights = tmp_path / "bundle" / "onnx" / "block_1.data"  # the twin: the second half is another model's
    (np.fromfile(weights, np.float32) * np.float32(1.5)).tofile(weights)
    seal(tmp_path / "bundle", open_manifest(tmp_path / "bundle"))
    assert recorded_ladder(tmp_path / "bundle").rung("onnxruntime end to end").status == "failed"


@pytest.mark.slow
def test_a_machine_with_room_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its memory is: the bundle is the same on all of them."""
    save_tiny_model(tmp_path / "model")
    path = write_recipe(tmp_path, ENGINES)
    monkeypatch.setattr(bundling, "prove", lambda *_: {})
    monkeypatch.setattr(bundling, "for_this_builder", lambda recipe: recipe.with_build_memory(64))
    made = build(path, tmp_path / "bundle", engines=True, record=False)
    monkeypatch.setattr(bundling, "for_this_builder", lambda recipe: recipe.with_build_memory(32))
    assert made.manifest.recipe["target"]["build_memory_gib"] is None
    assert build(path, tmp_path / "bundle", engines=True, record=False).cached
