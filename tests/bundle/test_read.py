"""Manifests and files: sealed ones pass, each kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tmc_export.bundle.manifest import SCHEMA, FileEntry, Manifest
from tmc_export.bundle.program import BlockProgram, GraphPhase, Program
from tmc_export.bundle.read import check_files, open_manifest, path_in
from tmc_export.bundle.write import hash_file, seal
from tmc_export.core.errors import BundleError, NotABundleError

PHASE = GraphPhase(file="onnx/a.onnx", tokens=1)
PROGRAM = Program(
    family="llava", dtype="float32", batch=1, images=0, width=4, vocabulary=8, heads=1, kv_heads=1, head_dim=4, rope_axes=1,
    position_rule="sequential", text_tokens=1, new_tokens=1, chunk=1, turns="freeze", image_token=0, image_text="<image>", eos=(1,),
    vision=(), embed={"decode": PHASE}, cuts=(),
    blocks=(BlockProgram(index=0, first=0, last=1, tokens=1, capacity=2, head=True, phases={"decode": PHASE}),),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "a.onnx").write_bytes(b"graph")
    (tmp_path / "notes").write_bytes(b"")
    seal(tmp_path, Manifest(name="x", key="k", recipe={}, plan={}, checkpoint={}, versions={}, program=PROGRAM))
    return tmp_path


def test_seal_lists_every_file_but_the_manifest(folder: Path) -> None:
    manifest = open_manifest(folder)
    assert manifest.files == {
        name: FileEntry(size=(folder / name).stat().st_size, sha256=hash_file(folder / name)) for name in ("notes", "onnx/a.onnx")
    }
    assert manifest.program == PROGRAM and not list(folder.glob("*.part"))
    check_files(folder, manifest)


def test_damage_is_named(folder: Path) -> None:
    manifest = open_manifest(folder)
    graph = folder / "onnx" / "a.onnx"
    graph.write_bytes(b"grapH")
    check_files(folder, manifest, sizes_only=True)
    check_files(folder, manifest, ["notes"])
    with pytest.raises(BundleError, match=r"'onnx/a\.onnx' differs"):
        check_files(folder, manifest)
    graph.write_bytes(b"gra")
    with pytest.raises(BundleError, match="has 3 bytes, the manifest says 5"):
        check_files(folder, manifest, sizes_only=True)
    graph.unlink()
    with pytest.raises(BundleError, match="missing"):
        check_files(folder, manifest, sizes_only=True)
    with pytest.raises(BundleError, match="'other' is not in the manifest"):
        check_files(folder, manifest, ["other"])


@pytest.mark.parametrize("name", ["../x", "onnx/../../x", "/etc/passwd", ".."])
def test_names_that_leave(folder: Path, name: str) -> None:
    with pytest.raises(BundleError, match="leaves the bundle"):
        path_in(folder, name)


def test_names_that_stay(folder: Path) -> None:
    assert path_in(folder, "onnx/a.onnx") == folder / "onnx" / "a.onnx"
    assert path_in(folder, "onnx/..a") == folder / "onnx" / "..a"


def test_manifests_that_are_none(folder: Path) -> None:
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    newer = {**good, "bundle": SCHEMA + 1, "unknown": 1}
    for data, says in [
        (newer, "schema 2, this tmc-export reads up to 1; upgrade"),
        ({**good, "nmae": 1}, "nmae"),
        ([], "damaged"),
        ("", "damaged"),
    ]:
        path.write_text(json.dumps(data))
        with pytest.raises(BundleError, match=says) as caught:
            open_manifest(folder)
        assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    path.unlink()
    for place, says in [(folder, "not a bundle"), (folder / "notes", "is a file"), (folder / "none", "does not exist")]:
        with pytest.raises(NotABundleError, match=says):
            open_manifest(place)
