"""All engines of a bundle: what is kept, what is built again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tmc_export.core.errors import BundleError, MissingExtraError
from tmc_export.engine import EngineOptions, build_engines, read_engines, read_profiles
from tmc_export.engine.bundle import file_sha256

OPTIONS = EngineOptions()


def built(bundle: Path, options: EngineOptions = OPTIONS, **more: bool) -> dict[str, bool]:
    return {report.name: report.built for report in build_engines(bundle, options, **more)}


def test_engines_are_built_once_and_again_when_something_changed(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    graph = (bundle / "engines/block_0.onnx").read_bytes()
    assert built(bundle) == {"block_0": True, "vision_0": True}
    assert (bundle / "engines/block_0.onnx").read_bytes() == graph  # hashed by the manifest
    first = {record.name: record for record in read_engines(bundle)}
    assert first["block_0"].profiles == ("prefill", "decode") and first["block_0"].capabilities == ("SM89",)
    for record in first.values():
        assert record.sha256 == file_sha256(bundle / record.file) and record.bytes == (bundle / record.file).stat().st_size
    again = build_engines(bundle, OPTIONS)
    assert [(report.built, report.multi_head_attention) for report in again] == [(False, 4), (False, 0)]
    assert not [path.name for path in (bundle / "engines").iterdir() if path.is_symlink() or "partial" in path.name]

    weights = bytearray((bundle / "onnx/block_0.data").read_bytes())
    weights[-1] ^= 1
    (bundle / "onnx/block_0.data").write_bytes(weights)
    assert built(bundle) == {"block_0": True, "vision_0": False}
    (bundle / "engines/vision_0.tensorrt-rtx.engine").unlink()
    assert built(bundle) == {"block_0": False, "vision_0": True}
    assert built(bundle, EngineOptions(capabilities=("SM86", "SM89"))) == {"block_0": True, "vision_0": True}
    assert read_engines(bundle)[0].capabilities == ("SM86", "SM89")
    assert built(bundle, EngineOptions(capabilities=("SM86", "SM89")), force=True) == {"block_0": True, "vision_0": True}


def test_a_failure_keeps_what_was_built(bundle: Path, graphs) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    graphs[2](bundle / "onnx/vision_0.onnx", "NonZero")
    from tmc_export.core.errors import ExportError

    with pytest.raises(ExportError, match="NonZero"):
        build_engines(bundle, OPTIONS)
    graphs[2](bundle / "onnx/vision_0.onnx")
    assert built(bundle) == {"block_0": False, "vision_0": True}


def test_a_missing_package_leaves_the_bundle_as_it_was(bundle: Path, fake_module) -> None:
    fake_module("tensorrt_rtx", "raise ImportError('no such package')")
    before = sorted(path.name for path in bundle.rglob("*"))
    with pytest.raises(MissingExtraError, match=r"tmc-export\[rtx\]"):
        build_engines(bundle, OPTIONS)
    assert sorted(path.name for path in bundle.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda item: item.update(onnx="../../etc/passwd"), "no path inside the bundle"),
        (lambda item: item.update(name="a b"), "holds other than letters"),
        (lambda item: item.update(name="vision_0"), "used twice"),
        (lambda item: item.update(profiles=[]), "has no profile"),
        (lambda item: item.pop("precision"), "KeyError"),
        (lambda item: item["profiles"][0]["shapes"].update(hidden=["T"]), "ValueError"),
    ],
)
def test_wrong_profiles_are_refused(bundle: Path, change, words: str) -> None:
    path = bundle / "engines/profiles.json"
    fields = json.loads(path.read_text())
    change(fields["subgraphs"][0])
    path.write_text(json.dumps(fields))
    with pytest.raises(BundleError, match=words):
        read_profiles(bundle)


def test_damaged_records_are_refused(bundle: Path) -> None:
    (bundle / "engines/engines.json").write_text('{"engines": [{}]}')
    with pytest.raises(BundleError, match="is damaged"):
        read_engines(bundle)
