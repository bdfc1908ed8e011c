"""Damaged bundles, and folders that are none: every verb says one line; 2 for a wrong folder, 4 for a damaged bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tests._tiny import listing, tmc
from tmc_export import cli

VERBS = cli.main.list_commands(click.Context(cli.main))
READERS = [v for v in ("run", "inspect", "engine", "doctor", "verify", "bench", "replay", "debug") if v in VERBS]
"""Verbs that take a bundle."""


def call(verb: str, bundle: Path) -> list[object]:
    out = bundle.parent / "made"
    needed: dict[str, list[object]] = {"run": ["--prompt", "what", "--threads", 1], "replay": ["-o", out], "debug": ["-o", out]}
    return [verb, bundle, *needed.get(verb, [])]


def refused(verb: str, bundle: Path, *says: str, code: int = 4) -> None:
    before = listing(bundle) if bundle.is_dir() else {}
    ran = tmc(*call(verb, bundle))
    error = ran.error()
    assert ran.code == code, error
    assert all(part in error for part in says), error
    assert ran.out == ""
    assert (listing(bundle) if bundle.is_dir() else {}) == before


def edit(bundle: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_the_verbs_that_take_a_bundle() -> None:
    assert {"run", "inspect", "engine", "doctor"} <= set(READERS)


@pytest.mark.parametrize("verb", READERS)
def test_no_bundle(verb: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    refused(verb, tmp_path / "nowhere", "nowhere", "does not exist", code=2)
    refused(verb, tmp_path / "folder", "not a bundle", "manifest.json", code=2)
    refused(verb, tmp_path / "file", "is a file", code=2)


@pytest.mark.parametrize("verb", READERS)
def test_damaged_manifest(verb: str, bundle: Path) -> None:
    manifest = bundle / "manifest.json"
    text = manifest.read_text()
    for wrong, says in [
        ("", "not JSON"),
        (text[: len(text) // 2], "not JSON"),
        ("[]", "manifest.json"),
        ("{}", "manifest.json"),
        ("[" * 100_000, "not JSON"),
        (text.replace('"program"', '"programme"', 1), "program"),
        (text.replace('"bundle": 1', '"bundle": 99', 1), "schema 99"),
    ]:
        assert wrong != text
        manifest.write_text(wrong)
        refused(verb, bundle, says)
    manifest.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    refused(verb, bundle, "not JSON")


def test_newer_schema_of_another_form(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"bundle": 2, "everything": "else"}')
    refused("run", bundle, "schema 2", "upgrade tmc-export")


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "onnx/../../outside.onnx"])
def test_a_manifest_that_leaves_the_bundle(bundle: Path, name: str) -> None:
    (bundle.parent / "outside.onnx").write_bytes(b"x")

    def point(data: dict[str, object]) -> None:
        files = data["files"]
        assert isinstance(files, dict)
        files[name] = {"size": 1, "sha256": "0" * 64}

    edit(bundle, point)
    refused("run", bundle, name, "leaves the bundle")


def test_a_program_that_leaves_the_bundle(bundle: Path) -> None:
    """The file list may be sound while the program names another file."""
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace('"file":"onnx/block_0_prefill', '"file":"../block').replace(
        '"file": "onnx/block_0_prefill.onnx"', '"file": "../block.onnx"'))  # fmt: skip
    assert (bundle / "manifest.json").read_text() != text
    refused("run", bundle, "../block", "leaves the bundle")


@pytest.mark.parametrize("file", ["onnx/block_0_prefill.onnx", "onnx/block_1.data", "model/tokenizer.json", "model/chat_template.jinja"])
def test_flipped_byte(bundle: Path, file: str) -> None:
    flip(bundle / file)
    refused("run", bundle, file, "differs from what was built", "copy or build")


def test_flipped_byte_in_large_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a size, a start looks at sizes only; `check_files` (which verify calls) finds it."""
    from tmc_export.bundle.read import check_files, open_manifest
    from tmc_export.core.errors import BundleError
    from tmc_export.runtime import session

    monkeypatch.setattr(session, "_HASHED_BYTES", 50_000)
    weights = bundle / "onnx" / "vision.data"
    assert weights.stat().st_size > 50_000
    flip(weights)
    assert tmc(*call("run", bundle)).code == 0
    with pytest.raises(BundleError, match=r"onnx/vision\.data' differs"):
        check_files(bundle, open_manifest(bundle))
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("run", bundle, "onnx/vision.data", "bytes")


@pytest.mark.skipif("verify" not in VERBS, reason="the verb verify does not exist yet")
@pytest.mark.parametrize("file", ["onnx/vision.data", "onnx/block_0_decode.onnx", "model/config.json"])
def test_verify_finds_a_flipped_byte(bundle: Path, file: str) -> None:
    flip(bundle / file)
    ran = tmc("verify", bundle)
    assert ran.code == 4 and file in ran.out + ran.err and "Traceback" not in ran.err


def test_missing_truncated_and_grown_files(bundle: Path) -> None:
    graph = bundle / "onnx" / "block_1_decode.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[:-7])
    refused("run", bundle, "onnx/block_1_decode.onnx", f"has {len(data) - 7} bytes, the manifest says {len(data)}")
    graph.write_bytes(data + b"\0")
    refused("run", bundle, "onnx/block_1_decode.onnx", "bytes")
    graph.unlink()
    refused("run", bundle, "onnx/block_1_decode.onnx", "is missing")
    graph.mkdir()
    refused("run", bundle, "onnx/block_1_decode.onnx", "is missing")


def test_unreadable_file(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pathlib

    name = "onnx/block_0.data"
    (bundle / name).chmod(0)
    if os.geteuid() == 0:  # nothing is unreadable to root: stand in for the system's refusal
        real = pathlib.Path.open

        def refuse(self: Path, *args: object, **kwargs: object) -> object:
            if self.name == "block_0.data":
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **kwargs)  # type: ignore[call-overload]

        monkeypatch.setattr(pathlib.Path, "open", refuse)
    refused("run", bundle, "Permission denied", "block_0.data", code=2)


def test_a_graph_that_is_none_under_a_true_hash(bundle: Path) -> None:
    """Whoever rewrites the manifest, too, still gets one line."""
    from tmc_export.bundle.write import hash_file

    graph = bundle / "onnx" / "block_0_prefill.onnx"
    graph.write_bytes(b"no graph")

    def fix(data: dict[str, object]) -> None:
        files = data["files"]
        assert isinstance(files, dict)
        files["onnx/block_0_prefill.onnx"] = {"size": 8, "sha256": hash_file(graph)}

    edit(bundle, fix)
    refused("run", bundle, "onnxruntime", "cannot load", "block_0_prefill.onnx")


@pytest.mark.skipif("bench" not in VERBS, reason="the verb bench does not exist yet")
def test_bench_against_no_bundle(built: Path, tmp_path: Path) -> None:
    ran = tmc("bench", built, "--against", tmp_path / "none")
    assert ran.code == 2 and "none" in ran.error()


def test_doctor_and_engine_on_damaged_records(bundle: Path) -> None:
    (bundle / "engines" / "engines.json").write_text("{")
    for verb in ("engine", "doctor"):
        refused(verb, bundle, "engines.json", "damaged")
    (bundle / "engines" / "engines.json").unlink()
    (bundle / "engines" / "profiles.json").write_text("[]")
    refused("engine", bundle, "profiles.json")
