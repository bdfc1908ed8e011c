"""Real TensorRT-RTX builds on the CPU. A fused attention shows as a layer named mha in the builder's log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tmc_export.core.errors import BundleError, ExportError, LegalityError, MissingExtraError, ResourceError
from tmc_export.engine import EngineOptions, EngineReport, build_engine
from tmc_export.engine import build as build_module
from tmc_export.engine._wire import profiles_from

OPTIONS = EngineOptions()
STATIC = profiles_from([{"name": "static", "shapes": {}}])


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")


def build_block(folder: Path, graphs, *, decode: int = 2, **kind: object) -> tuple[EngineReport, int]:
    block = graphs[0](folder / "onnx/block_0.onnx", **kind)
    report = build_engine(block.path, profiles_from(block.profiles(decode)), folder / "engines/block_0.engine", OPTIONS)
    return report, block.weight_bytes


def test_a_symbolic_block_is_one_engine_with_two_static_profiles(rtx: None, tmp_path: Path, graphs) -> None:
    phases: list[str] = []
    block = graphs[0](tmp_path / "block_0.onnx")
    out = tmp_path / "block_0.engine"
    report = build_engine(block.path, profiles_from(block.profiles()), out, OPTIONS, lambda name, phase, done, total: phases.append(phase))
    assert report.path == out and report.size == out.stat().st_size > block.weight_bytes
    assert report.profiles == ("prefill", "decode") and report.capabilities == ("SM89",)
    assert report.multi_head_attention == 4  # two layers, two profiles
    assert len(report.activation_bytes) == 2 and min(report.activation_bytes) > 0
    assert report.peak_rss > 2**26 and report.seconds > 0 and report.version.startswith("1.")
    assert "Building engine" in phases
    saved = json.loads((tmp_path / "block_0.engine.layers.json").read_text())
    assert [layer["name"] for layer in saved["layers"]] == [layer.name for layer in report.layers]
    assert not list(tmp_path.glob(".*partial")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", [{"expose": True}, {"half": False}], ids=["probabilities are an output", "float32"])
def test_attention_is_not_fused(rtx: None, tmp_path: Path, graphs, kind: dict[str, bool]) -> None:
    report, _ = build_block(tmp_path, graphs, **kind)
    assert report.layers and report.multi_head_attention == 0


def test_decode_width_two_stores_the_weights_once(rtx: None, tmp_path: Path, graphs) -> None:
    once, weights = build_block(tmp_path / "two", graphs, width=1024)
    twice, _ = build_block(tmp_path / "one", graphs, width=1024, decode=1)
    assert once.size < 1.2 * weights
    assert twice.size > 1.6 * weights  # the matrix-vector kernels want another layout


def test_int4_blocks_build(rtx: None, tmp_path: Path, graphs) -> None:
    graphs[1](tmp_path / "linear.onnx")
    report = build_engine(tmp_path / "linear.onnx", STATIC, tmp_path / "linear.engine", OPTIONS, precision="int4")
    assert report.size > 256 * 256 // 2 and report.profiles == ("static",)


def test_int4_does_not_build_for_an_older_gpu(rtx: None, tmp_path: Path, graphs) -> None:
    graphs[1](tmp_path / "linear.onnx")
    options = EngineOptions(capabilities=("SM75",))
    with pytest.raises(ExportError, match="linear: TensorRT .* cannot build it"):
        build_engine(tmp_path / "linear.onnx", STATIC, tmp_path / "linear.engine", options, precision="int4")
    assert not (tmp_path / "linear.engine").exists() and not list(tmp_path.glob(".*partial"))


def test_a_refused_operator_is_named_with_its_node(rtx: None, tmp_path: Path, graphs) -> None:
    graphs[2](tmp_path / "g.onnx", "NonZero")
    with pytest.raises(ExportError) as caught:
        build_engine(tmp_path / "g.onnx", STATIC, tmp_path / "g.engine", OPTIONS)
    message = str(caught.value)
    assert "NonZero" in message and "the_node" in message and ".cpp:" in message and "\n" not in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": [1, 128, 99]}, "is \\(1, -1, 256\\) in the graph, the profile says \\(1, 128, 99\\)"),
        ({"nothing": [1]}, "the graph has no input nothing"),
        ({"hidden": [1, 128]}, "name every dimension"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(rtx: None, tmp_path: Path, graphs, change: dict[str, list[int]], reason: str) -> None:
    block = graphs[0](tmp_path / "block_0.onnx")
    profile = {"name": "prefill", "shapes": block.shapes(128, 0) | change}
    with pytest.raises(ExportError, match=reason):
        build_engine(block.path, profiles_from([profile]), tmp_path / "block_0.engine", OPTIONS)


def test_a_missing_package_names_the_extra(tmp_path: Path, graphs, fake_module) -> None:
    fake_module("tensorrt_rtx", "raise ImportError('no such package')")
    graphs[2](tmp_path / "g.onnx")
    with pytest.raises(MissingExtraError, match=r"tmc-export\[rtx\]"):
        build_engine(tmp_path / "g.onnx", STATIC, tmp_path / "g.engine", OPTIONS)


@pytest.mark.parametrize(
    ("signal", "kind", "words"), [("SIGKILL", ResourceError, "killed"), ("SIGSEGV", ExportError, "crashed on g with SIGSEGV")]
)
def test_a_builder_that_dies_is_one_line(tmp_path: Path, graphs, fake_module, signal: str, kind: type[Exception], words: str) -> None:
    source = "import os, signal\n__version__ = '1.7'\ndef __getattr__(name):\n    os.kill(os.getpid(), signal.SIG)\n"
    fake_module("tensorrt_rtx", source.replace("SIG)", signal + ")"))
    graphs[2](tmp_path / "g.onnx")
    (tmp_path / ".g.engine.1.partial").write_bytes(b"half an engine")
    with pytest.raises(kind, match=words) as caught:
        build_engine(tmp_path / "g.onnx", STATIC, tmp_path / "g.engine", OPTIONS)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*partial")) and not (tmp_path / "g.engine").exists()


def test_too_little_memory_is_refused_with_figures(tmp_path: Path, graphs, fake_module, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module("tensorrt_rtx", "__version__ = '1.7'")
    block = graphs[0](tmp_path / "block_0.onnx")
    monkeypatch.setattr(build_module, "available_bytes", lambda: 2**29)
    with pytest.raises(ResourceError, match=r"block_0 needs about 0\.8 GiB of memory and 0\.5 GiB are free"):
        build_engine(block.path, profiles_from(block.profiles()), tmp_path / "block_0.engine", OPTIONS)


def test_a_missing_weight_file_is_named(tmp_path: Path, graphs, fake_module) -> None:
    fake_module("tensorrt_rtx", "__version__ = '1.7'")
    block = graphs[0](tmp_path / "block_0.onnx")
    (tmp_path / "block_0.data").unlink()
    with pytest.raises(BundleError, match=r"'block_0\.data', which is missing"):
        build_engine(block.path, profiles_from(block.profiles()), tmp_path / "block_0.engine", OPTIONS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capabilities": ("SM87",)}, "build_on_device.sh"),
        ({"capabilities": ()}, "no compute capability"),
        ({"flavour": "tensor-rt"}, "did you mean 'tensorrt"),
        ({"builder_optimization_level": 9}, "outside 0..5"),
        ({"workspace_mib": 0}, "must be positive"),
        ({"verbosity": "loud"}, "choose one of"),
    ],
)
def test_options_no_builder_takes(options: dict[str, object], words: str) -> None:
    with pytest.raises(LegalityError, match=words):
        EngineOptions(**options)  # type: ignore[arg-type]
