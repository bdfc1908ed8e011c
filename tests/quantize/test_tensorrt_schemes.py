"""A decoder block under every weight scheme, built by TensorRT-RTX for every capability that `plan` allows, and refused for the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tmc_export.core.errors import ExportError
from tmc_export.engine import EngineOptions, EngineReport, build_engine
from tmc_export.engine._wire import profiles_from
from tmc_export.engine.options import RTX_CAPABILITIES
from tmc_export.plan.quantization import LEAST_CAPABILITY

pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")

SEES = {"fp16": "Half", "bf16": "BFloat16", "int8": "Int8", "int4": "Int4", "fp8": "FP8", "nvfp4": "FP4E2M1"}
"""Scheme → the type of the weights in the builder's log."""


def sm(capability: str) -> int:
    return int(capability.replace(".", ""))


def legal(scheme: str) -> tuple[str, ...]:
    return tuple(name for name in RTX_CAPABILITIES if int(name[2:]) >= sm(LEAST_CAPABILITY[scheme]))


def built_for(*capabilities: str) -> str:
    return "{device: rtx-5090, runtime: tensorrt-rtx}" if capabilities == ("nvfp4",) else "{device: rtx-4090, runtime: tensorrt-rtx}"


@pytest.fixture(scope="module")
def engine(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., EngineReport]:
    made: dict[str, Path] = {}
    reports: dict[tuple[str, tuple[str, ...], str], EngineReport] = {}

    def make(scheme: str, capabilities: tuple[str, ...], name: str = "block_0") -> EngineReport:
        key = scheme, capabilities, name
        if key in reports:
            return reports[key]
        if scheme not in made:
            block = ", block: 32" if scheme == "int4" else ""
            parts = [
                "decoder",
                *(["encoder"] if scheme in ("int8", "fp8", "nvfp4") else []),
                *(["head"] if scheme in ("int8", "fp8") else []),
            ]
            quantize = ", ".join(f"{p}: {{weights: {scheme}{block}}}" for p in parts)
            dtype = "float32" if scheme in ("fp16", "bf16") else "float16"
            made[scheme] = build(f"rtx_{scheme}", quantize, dtype=dtype, target=built_for(scheme))
        (spec,) = (s for s in json.loads((made[scheme] / "engines/profiles.json").read_text())["subgraphs"] if s["name"] == name)
        out = tmp_path_factory.mktemp("engine") / f"{name}.engine"
        reports[key] = build_engine(
            made[scheme] / spec["onnx"], profiles_from(spec["profiles"]), out, EngineOptions(capabilities=capabilities),
            precision=spec["precision"],
        )  # fmt: skip
        return reports[key]

    return make


@pytest.mark.parametrize("which", ["the least", pytest.param("the others", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "nvfp4"])
def test_a_block_builds_for_every_legal_capability_with_its_codes(scheme: str, which: str, engine: Callable[..., EngineReport]) -> None:
    capabilities = legal(scheme)
    assert len(capabilities) == {"int8": 6, "int4": 5, "fp8": 3, "nvfp4": 2}[scheme]
    for capability in capabilities[:1] if which == "the least" else capabilities[1:]:
        report = engine(scheme, (capability,))
        assert report.size > 0 and report.capabilities == (capability,)
        assert report.profiles == ("prefill", "chunk", "decode")
        readers = [layer for layer in report.layers if SEES[scheme] in layer.constants]
        # query, key and value are one, gate and up are joined by the builder: four products, three profiles
        assert len(readers) >= 3 * 4, f"{capability}: {[layer.constants for layer in report.layers]}"
        others = set(SEES.values()) - {SEES[scheme], "Half"} - ({"FP8"} if scheme == "nvfp4" else set())
        assert not [layer for layer in report.layers if others & set(layer.constants)]


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "nvfp4"])
def test_codes_are_fused_into_products_but_for_nvfp4(scheme: str, engine: Callable[..., EngineReport]) -> None:
    """What docs/quantization.md says of nvfp4 as weights alone: every product waits for a kernel that widens its codes."""
    report = engine(scheme, ("SM120",))
    readers = [layer for layer in report.layers if SEES[scheme] in layer.constants]
    fused = [layer for layer in readers if layer.kind == "runtime_fusion" and layer.name.split("_myl")[1].endswith("Fc")]
    assert readers and len(fused) >= 3 * 2 if scheme != "nvfp4" else not fused, [(layer.kind, layer.name) for layer in readers]


@pytest.mark.parametrize(
    ("scheme", "capability"), [("int4", "SM75"), ("fp8", "SM86"), ("nvfp4", "SM89"), ("bf16", "SM75"), ("fp16", "SM75")]
)
def test_what_plan_refuses_does_not_build(scheme: str, capability: str, engine: Callable[..., EngineReport]) -> None:
    base = {"fp16": "float32", "bf16": "float32"}.get(scheme, scheme)
    assert int(capability[2:]) < max(sm(LEAST_CAPABILITY[scheme]), sm(LEAST_CAPABILITY[base]))
    with pytest.raises(ExportError, match="cannot build it"):
        engine(scheme, (capability,))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nvfp4"])
def test_the_vision_graph_builds(scheme: str, engine: Callable[..., EngineReport]) -> None:
    report = engine(scheme, (legal(scheme)[-1],), "vision_0")
    assert report.size > 0 and any(SEES[scheme] in layer.constants for layer in report.layers)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_the_head_builds(scheme: str, engine: Callable[..., EngineReport]) -> None:
    report = engine(scheme, ("SM89",), "block_1")
    assert sum(SEES[scheme] in layer.constants for layer in report.layers) >= 3 * 5  # the head is the fifth


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_floating_point_schemes_build_and_are_stored_as_float32(scheme: str, engine: Callable[..., EngineReport]) -> None:
    report = engine(scheme, ("SM80",))
    constants = {kind for layer in report.layers for kind in layer.constants}
    assert report.size > 0 and "Float" in constants and SEES[scheme] not in constants, constants
