"""Wrong plans of `quantize`: each ends in an error that names file, line, column, the reason and the fix. Good twins are not refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.plan._wrong import Wrong, check_refusal, refused
from tests.plan.conftest import Writer
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.make import make_plan

DATA = "calibration: {images: a, prompts: b.jsonl}"
FOUR = "weights: nvfp4, activations: nvfp4"
INT4 = "{decoder: {weights: int4, block: 128}}"

WRONG: list[Wrong] = [
    (
        "int4 on 7.5",
        (),
        {"quantize": INT4, "target": "device: rtx-4090, runtime: tensorrt-rtx, compute_capabilities: ['7.5', '8.9']"},
        "5:31",
        ("int4 does not build for compute capability 7.5",),
    ),
    (
        "fp8 on ampere",
        (),
        {"quantize": "{decoder: {weights: fp8}}", "target": "device: rtx-a2000-laptop, runtime: tensorrt-rtx"},
        "5:31",
        ("fp8 does not build for compute capability 8.6, it needs 8.9",),
    ),
    (
        "fp8 on one of the cards",
        (),
        {
            "quantize": "{encoder: {weights: fp8}}",
            "target": "device: rtx-4090, runtime: tensorrt-rtx, compute_capabilities: ['8.6', '8.9']",
        },
        "5:31",
        ("fp8 does not build for compute capability 8.6", "leave 8.6 out of the target"),
    ),
    (
        "nvfp4 on ada",
        (),
        {"quantize": "{decoder: {weights: nvfp4}}", "target": "device: rtx-4090, runtime: tensorrt-rtx"},
        "5:31",
        ("nvfp4 does not build for compute capability 8.9, it needs 10.0",),
    ),
    ("fp8 on orin", (), {"quantize": "{head: {weights: fp8}}"}, "5:28", ("fp8 does not run on 'jetson-agx-orin-64gb'", "int8, int4")),
    ("nvfp4 on orin", (), {"quantize": "{projector: {weights: nvfp4}}"}, "5:33", ("nvfp4 does not run on 'jetson-agx-orin-64gb'",)),
    (
        "nvfp4 on a cpu",
        (),
        {"quantize": "{decoder: {weights: nvfp4}}", "target": "device: cpu, runtime: onnxruntime"},
        "5:31",
        ("nvfp4 does not run on 'cpu'",),
    ),
    (
        "nvfp4 on the cpu of a card that has it",
        (),
        {"quantize": "{decoder: {weights: nvfp4}}", "target": "device: rtx-5090, runtime: onnxruntime"},
        "5:31",
        ("onnxruntime's CPU path does not execute nvfp4", "fp16, bf16, int8, int4, fp8"),
    ),
    (
        "bf16 beside float16",
        (),
        {"quantize": "{decoder: {weights: bf16}}", "target": "device: rtx-4090, runtime: tensorrt-rtx"},
        "5:31",
        ("bf16 weights take as many bytes as float16", "model.dtype: float32"),
    ),
    (
        "fp8 slots on ampere",
        (),
        {"quantize": f"{{kv: {{weights: fp8}}, {DATA}}}", "target": "device: rtx-a2000-laptop, runtime: tensorrt-rtx"},
        "5:26",
        ("fp8 does not build for compute capability 8.6, it needs 8.9; write int8, or leave 8.6 out of the target",),
    ),
    (
        "fp8 slots on orin",
        (),
        {"quantize": f"{{kv: {{weights: fp8}}, {DATA}}}"},
        "5:26",
        ("fp8 does not run on 'jetson-agx-orin-64gb'; it has fp32, fp16, int8, int4",),
    ),
    (
        "fp8 slots in a board's engines",
        (),
        {"quantize": f"{{kv: {{weights: fp8}}, {DATA}}}", "target": "device: jetson-agx-thor, runtime: tensorrt"},
        "5:26",
        ("quantize.kv.weights: fp8 slots are built for onnxruntime and tensorrt-rtx", "one scale per tensor", "write weights: fp16"),
    ),
    (
        "fp8 slots without data",
        (),
        {"quantize": "{kv: {weights: fp8}}", "target": "device: cpu, runtime: onnxruntime"},
        "5:26",
        ("quantize.kv.weights: fp8 is found on data; add quantize.calibration",),
    ),
    (
        "fp8 slots and an observer of equal steps",
        (),
        {
            "quantize": f"{{kv: {{weights: fp8}}, {DATA[:-1]}, observer: mse}}}}",
            "target": "device: cpu, runtime: onnxruntime",
        },
        "5:85",
        ("observer: mse reckons with equal steps, and the fp8 codes of quantize.kv have none; write minmax or percentile",),
    ),
    (
        "int8 slots in a board's engines",
        (),
        {"quantize": "{kv: {weights: int8}}"},
        "5:26",
        ("quantize.kv.weights: int8 slots are built for onnxruntime and tensorrt-rtx", "one scale per tensor", "write weights: fp16"),
    ),
    (
        "int8 slots in a board's engines of float32",
        (),
        {"model": "dtype: float32", "quantize": "{kv: {weights: int8}}"},
        "5:26",
        ("such slots have one per head; remove quantize.kv",),
    ),
    (
        "int8 slots without data",
        (),
        {"quantize": "{kv: {weights: int8}}", "target": "device: cpu, runtime: onnxruntime"},
        "5:26",
        ("quantize.kv.weights: int8 is found on data; add quantize.calibration",),
    ),
    (
        "calibration that nothing needs",
        (),
        {"quantize": "{decoder: {weights: int8}, calibration: {images: a, prompts: b.jsonl}}"},
        "5:51",
        ("quantize.calibration has nothing to calibrate", "remove it"),
    ),
    (
        "quantized encoder without pictures",
        (),
        {"inputs": "images: 0, text_tokens: 8, new_tokens: 8", "quantize": "{encoder: {weights: fp16}}"},
        "5:21",
        ("quantize.encoder has nothing to act on",),
    ),
    (
        "keep that matches nothing",
        (),
        {"quantize": "{decoder: {weights: int4, block: 128, keep: [down_proj, mlp.fc1]}}"},
        "5:67",
        ("'mlp.fc1' matches no linear", "layers.<0 to 31>", "mlp.down_proj"),
    ),
]


@pytest.mark.parametrize(("name", "entries", "lines", "place", "says"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_plans(
    name: str, entries: tuple[str, ...], lines: dict[str, Any], place: str, says: tuple[str, ...], write: Writer, files: ModelFiles
) -> None:
    check_refusal(write(*entries, **lines), files, place, says)


@pytest.mark.parametrize(
    ("entries", "lines"),
    [
        ((), {"quantize": INT4, "target": "device: rtx-4090, runtime: tensorrt-rtx"}),
        ((), {"quantize": "{encoder: {weights: int8}, projector: {weights: int8}, decoder: {weights: int8}, head: {weights: int8}}"}),
        ((), {"quantize": "{decoder: {weights: fp8, keep: [down_proj]}}", "target": "device: rtx-4090, runtime: tensorrt-rtx"}),
        ((), {"quantize": f"{{decoder: {{{FOUR}}}, {DATA}}}", "target": "device: rtx-5090, runtime: tensorrt-rtx"}),
        ((), {"quantize": f"{{kv: {{weights: fp8}}, {DATA}}}", "target": "device: rtx-4090, runtime: tensorrt-rtx"}),
        ((), {"quantize": f"{{kv: {{weights: fp8}}, {DATA}}}", "target": "device: cpu, runtime: onnxruntime"}),
        ((), {"quantize": "{encoder: {weights: nvfp4, block: 16}}", "target": "device: rtx-5090, runtime: tensorrt-rtx"}),
        ((), {"quantize": "{decoder: {weights: nvfp4}, head: {weights: fp8}}", "target": "device: jetson-agx-thor, runtime: tensorrt"}),
        (
            (),
            {
                "quantize": "{decoder: {weights: bf16}, encoder: {weights: fp8}}",
                "model": "dtype: float32",
                "target": "device: cpu, runtime: onnxruntime",
            },
        ),
        ((), {"quantize": "{decoder: {weights: int4, block: 64, keep: [down_proj, layers.31]}}"}),
    ],
)
def test_good_twins(entries: tuple[str, ...], lines: dict[str, Any], write: Writer, files: ModelFiles) -> None:
    plan, splits = make_plan(write(*entries, **lines), files)
    assert plan.blocks[-1].last == 32 and splits == ()


def test_a_device_without_int4(write: Writer, files: ModelFiles, tmp_path: Path, repository: Path) -> None:
    text = (repository / "devices" / "jetson-agx-orin-64gb.yaml").read_text("utf-8")
    (tmp_path / "old.yaml").write_text(text.replace("name: jetson-agx-orin-64gb", "name: old").replace("int8, int4]", "int8]"), "utf-8")
    recipe = write(quantize=INT4, target="device: ./old.yaml, runtime: tensorrt")
    assert ":5:31: int4 does not run on 'old'; it has fp32, fp16, int8" in str(refused(recipe, files))
