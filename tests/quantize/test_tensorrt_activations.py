"""Products of codes with codes, built by TensorRT-RTX: the log shows 8-bit and 4-bit kernels, and fused attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tmc_export.core.errors import ExportError
from tmc_export.engine import EngineOptions, EngineReport, build_engine
from tmc_export.engine._wire import profiles_from

pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")

SEES = {"int8": "Int8", "fp8": "FP8", "nvfp4": "FP4E2M1"}
Engine = Callable[..., EngineReport]


@pytest.fixture(scope="module")
def engine(build: Callable[..., Path], calibration: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    made: dict[tuple[str, bool], Path] = {}

    def make(scheme: str, capability: str, name: str, activations: bool = True) -> EngineReport:
        if (scheme, activations) not in made:
            part = f"{{weights: {scheme}{f', activations: {scheme}' if activations else ''}}}"
            quantize = f"encoder: {part}, decoder: {part}{f', {calibration}' if activations else ''}"
            target = f"{{device: {'rtx-5090' if scheme == 'nvfp4' else 'rtx-4090'}, runtime: tensorrt-rtx}}"
            made[scheme, activations] = build(f"codes_{scheme}_{activations}", quantize, dtype="float16", target=target)
        folder = made[scheme, activations]
        (spec,) = (s for s in json.loads((folder / "engines/profiles.json").read_text())["subgraphs"] if s["name"] == name)
        out = tmp_path_factory.mktemp("engine") / f"{name}.engine"
        options = EngineOptions(capabilities=(capability,))
        return build_engine(folder / spec["onnx"], profiles_from(spec["profiles"]), out, options, precision=spec["precision"])

    return make


def products_of_codes(report: EngineReport, scheme: str) -> int:
    """Kernels of a product itself, not of one fused behind a widening of its weight, that read stored codes."""
    return sum(layer.kind == "gemm" and SEES[scheme] in layer.constants for layer in report.layers)


@pytest.mark.parametrize(
    ("scheme", "capability"),
    [
        ("int8", "SM75"), ("int8", "SM86"), ("int8", "SM89"), ("int8", "SM120"), ("fp8", "SM89"), ("fp8", "SM120"), ("fp8", "SM121"),
        ("nvfp4", "SM120"), pytest.param("nvfp4", "SM121", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_block_multiplies_codes_with_codes(scheme: str, capability: str, engine: Engine) -> None:
    report = engine(scheme, capability, "block_0")
    assert report.size > 0 and report.profiles == ("prefill", "chunk", "decode")
    # query with key and value, output, gate, up (the builder may join the two), down: in each of three profiles
    assert products_of_codes(report, scheme) >= 3 * 4, [(layer.kind, layer.name, layer.constants) for layer in report.layers]
    assert sum(layer.attention for layer in report.layers) >= 3
    readers = [layer for layer in report.layers if SEES[scheme] in layer.constants]
    assert all(layer.kind == "gemm" for layer in readers), [(layer.kind, layer.name) for layer in readers]  # nothing widens a weight


@pytest.mark.parametrize(("scheme", "capability"), [("fp8", "SM89"), ("nvfp4", "SM120")])
def test_the_vision_graph_multiplies_codes_with_codes(scheme: str, capability: str, engine: Engine) -> None:
    assert products_of_codes(engine(scheme, capability, "vision_0"), scheme) >= 3


@pytest.mark.parametrize(("scheme", "capability"), [("fp8", "SM86"), ("nvfp4", "SM89")])
def test_what_plan_refuses_does_not_build(scheme: str, capability: str, engine: Engine) -> None:
    with pytest.raises(ExportError, match="cannot build it"):
        engine(scheme, capability, "block_0")


@pytest.mark.parametrize(("scheme", "capability"), [("int8", "SM86"), pytest.param("nvfp4", "SM120", marks=pytest.mark.slow)])
def test_weights_alone_are_not_counted(scheme: str, capability: str, engine: Engine) -> None:
    """The negative twin: without activations the builder's products widen the weights."""
    report = engine(scheme, capability, "block_0", activations=False)
    assert any(SEES[scheme] in layer.constants for layer in report.layers) and products_of_codes(report, scheme) == 0
