"""Sealing: every file of a bundle is hashed, and only the manifest itself is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime._fake import make_program
from tmc_export.bundle.manifest import MANIFEST, Manifest
from tmc_export.bundle.read import check_files, open_manifest
from tmc_export.bundle.write import seal
from tmc_export.core.errors import BundleError


def test_engines_built_again_do_not_damage_the_bundle(tmp_path: Path) -> None:
    """They have a record of their own; what they are built from is hashed."""
    built = ["block_0.tensorrt-rtx.engine", "block_0.tensorrt-rtx.engine.layers.json", "engines.json", "timing.cache"]
    (tmp_path / "engines").mkdir()
    for name in (*built, "block_0.onnx", "profiles.json"):
        (tmp_path / "engines" / name).write_text(name)
    sealed = seal(tmp_path, Manifest(name="x", key="k", recipe={}, plan={}, checkpoint={}, versions={}, program=make_program()))
    assert sorted(sealed.files) == ["engines/block_0.onnx", "engines/profiles.json"]
    for name in built:
        (tmp_path / "engines" / name).write_text("for another GPU")
    check_files(tmp_path, sealed)
    (tmp_path / "engines/block_0.onnx").write_text("another graph")
    with pytest.raises(BundleError, match=r"engines/block_0\.onnx"):
        check_files(tmp_path, sealed)


def test_every_file_is_hashed_also_one_that_is_called_like_the_manifest(tmp_path: Path) -> None:
    for name in ("onnx/a.onnx", f"model/{MANIFEST}"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    empty = Manifest(name="x", key="k", recipe={}, plan={}, checkpoint={}, versions={}, program=make_program())
    sealed = seal(tmp_path, empty)
    assert sorted(sealed.files) == ["model/" + MANIFEST, "onnx/a.onnx"]
    assert open_manifest(tmp_path) == sealed
    check_files(tmp_path, sealed)
    (tmp_path / "model" / MANIFEST).write_text("model/manifest.jsoN")
    with pytest.raises(BundleError, match="differs from what was built"):
        check_files(tmp_path, sealed)
