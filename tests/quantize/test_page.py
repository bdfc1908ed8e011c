"""docs/quantization.md says what the code does: parts, capabilities and devices of every scheme."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.plan.conftest import TINY
from tmc_export.core.errors import LegalityError
from tmc_export.core.stored_codes import METHODS
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.make import make_plan
from tmc_export.plan.quantization import LEAST_CAPABILITY, ON_ONNXRUNTIME
from tmc_export.plan.source import read_model_files
from tmc_export.recipe import Recipe, devices, load_recipe
from tmc_export.recipe._schemes import BLOCKS_OF, BUILT, PARTS_OF

PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"
SCHEMES = ("fp16", "bf16", "int8", "int4", "fp8", "nvfp4")


def tables() -> list[list[list[str]]]:
    """Rows of cells of every table of the page, without its ruler."""
    blocks = re.findall(r"(?:^\|.*\n)+", PAGE.read_text("utf-8"), re.M)
    return [[[c.strip() for c in row.strip("|").split("|")] for row in b.splitlines() if not row.startswith("|---")] for b in blocks]


@pytest.fixture(scope="module")
def tiny() -> ModelFiles:
    return read_model_files(TINY)


def recipe(folder: Path, scheme: str, device: str, runtime: str) -> Recipe:
    (folder / "MODEL").symlink_to(TINY) if not (folder / "MODEL").exists() else None
    block = f", block: {BLOCKS_OF[scheme][0]}" if scheme in BLOCKS_OF else ""
    dtype = "float32" if scheme == "bf16" else "float16"
    path = folder / f"{scheme}-{device}.yaml"
    path.write_text(
        f"recipe: 1\nname: t\nmodel: {{source: ./MODEL, dtype: {dtype}}}\ninputs: {{images: 1, text_tokens: 8, new_tokens: 8}}\n"
        f"quantize: {{decoder: {{weights: {scheme}{block}}}}}\ntarget: {{device: {device}, runtime: {runtime}}}\n",
        "utf-8",
    )
    return load_recipe(path)


def test_every_scheme_has_its_row() -> None:
    rows = {row[0].strip("`"): row for row in tables()[1][1:]}
    assert tuple(rows) == SCHEMES and set(SCHEMES) == set(BUILT)
    for name, row in rows.items():
        assert tuple(row[2].split(", ")) == PARTS_OF[name]
        assert row[4] == LEAST_CAPABILITY[name]
        assert ("does not run" in row[5]) == (name not in ON_ONNXRUNTIME)


def test_every_device_has_its_row(tmp_path: Path, tiny: ModelFiles) -> None:
    head, *rows = tables()[2]
    assert tuple(head[1:]) == SCHEMES and [row[0] for row in rows] == [device.name for device in devices()]
    for row, device in zip(rows, devices(), strict=True):
        runtime = "onnxruntime" if device.tensorrt.flavour == "none" else device.tensorrt.flavour
        for scheme, cell in zip(SCHEMES, row[1:], strict=True):
            wanted = recipe(tmp_path, scheme, device.name, runtime)
            if cell == "yes":
                make_plan(wanted, tiny)
                continue
            assert cell == "–"
            with pytest.raises(LegalityError, match=rf":5:\d+: {scheme} does not"):
                make_plan(wanted, tiny)


def test_a_wrong_cell_would_be_found(tmp_path: Path, tiny: ModelFiles) -> None:
    with pytest.raises(LegalityError):
        make_plan(recipe(tmp_path, "fp8", "rtx-a2000-laptop", "tensorrt-rtx"), tiny)


def test_every_method_of_quantized_checkpoints_has_its_row() -> None:
    head, *rows = tables()[3]
    assert head[0] == "`quant_method`" and [row[0].strip("`") for row in rows] == list(METHODS)


def test_the_figures_of_gaussian_weights_are_so() -> None:
    import ml_dtypes

    from tmc_export.quantize._channels import channel_scales, quantize_channels
    from tmc_export.quantize.fp8 import FP8
    from tmc_export.quantize.int4 import dequantize_blocks, quantize_blocks
    from tmc_export.quantize.int8 import INT8
    from tmc_export.quantize.nvfp4 import dequantize_nvfp4, global_scale, quantize_nvfp4

    weight = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)

    def db(got: np.ndarray) -> float:
        noise = np.square(weight - got, dtype=np.float64).sum()
        return round(float(10 * np.log10(np.square(weight, dtype=np.float64).sum() / noise)), 1)

    found = {"bf16": db(weight.astype(ml_dtypes.bfloat16).astype(np.float32))}
    for scheme in (INT8, FP8):
        scales = channel_scales(weight, 1, scheme.top)
        found[scheme.name] = db(quantize_channels(weight, scales, 1, scheme).astype(np.float32) * scales)
    scale = global_scale(float(np.abs(weight).max()), np.float32)
    found["nvfp4"] = db(dequantize_nvfp4(*quantize_nvfp4(weight, scale), scale))
    blocks = [db(dequantize_blocks(*quantize_blocks(weight, block))) for block in BLOCKS_OF["int4"]]
    text = ", ".join(f"{name} {value}{' dB' if name == 'bf16' else ''}" for name, value in found.items())
    assert f"{text}, int4 {blocks[0]}, {blocks[1]} and {blocks[2]}" in PAGE.read_text("utf-8")
