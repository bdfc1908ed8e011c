"""Every scheme on every compute capability that TensorRT-RTX builds for: `plan` takes it, or refuses it at the recipe's line."""

from __future__ import annotations

import pytest

from tests.plan.conftest import Writer
from tmc_export.core.errors import LegalityError
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.legality import RTX_CAPABILITIES
from tmc_export.plan.make import make_plan
from tmc_export.plan.quantization import LEAST_CAPABILITY
from tmc_export.recipe._schemes import ACTIVATION_PARTS, BLOCKS_OF, BUILT, PARTS_OF

DATA = "calibration: {images: a, prompts: b.jsonl}"
LEAST = {"fp16": "7.5", "bf16": "8.0", "int8": "7.5", "int4": "8.0", "fp8": "8.9", "nvfp4": "10.0"}
"""Written out here, so that a change of the table is seen."""
PARTS = [(scheme, part) for scheme in BUILT for part in PARTS_OF[scheme] if part != "kv"]


def number(capability: str) -> tuple[int, ...]:
    return tuple(int(n) for n in capability.split("."))


def needs(scheme: str) -> str:
    """bf16 stands beside float32 alone, which itself needs 8.0."""
    return max(LEAST[scheme], LEAST_CAPABILITY["float32"] if scheme == "bf16" else "7.5", key=number)


def test_the_table_is_the_one_written_here() -> None:
    assert {scheme: LEAST_CAPABILITY[scheme] for scheme in BUILT} == LEAST


@pytest.mark.parametrize("capability", RTX_CAPABILITIES)
@pytest.mark.parametrize("scheme", ["fp16", "int8", "fp8"])
def test_slots_are_taken_or_refused_at_their_line(scheme: str, capability: str, write: Writer, files: ModelFiles) -> None:
    assert scheme in BUILT and "kv" in PARTS_OF[scheme] and {s for s in BUILT if "kv" in PARTS_OF[s]} == {"fp16", "int8", "fp8"}
    recipe = write(
        inputs="images: 1, text_tokens: 8, new_tokens: 8",
        quantize=f"{{kv: {{weights: {scheme}}}{'' if scheme == 'fp16' else f', {DATA}'}}}",
        target=f"device: rtx-5090, runtime: tensorrt-rtx, compute_capabilities: {sorted({capability, '12.0'})}",
    )
    if number(capability) >= number(LEAST[scheme]):
        make_plan(recipe, files)
        return
    with pytest.raises(LegalityError) as caught:
        make_plan(recipe, files)
    place = recipe.origin(("quantize", "kv", "weights"))
    fix = f"write int8, or leave {capability} out of the target"
    assert str(caught.value) == f"{place}: fp8 does not build for compute capability {capability}, it needs 8.9; {fix}"


@pytest.mark.parametrize("capability", RTX_CAPABILITIES)
@pytest.mark.parametrize(("scheme", "part"), PARTS)
def test_a_scheme_is_taken_or_refused_at_its_line(scheme: str, part: str, capability: str, write: Writer, files: ModelFiles) -> None:
    block = f", block: {BLOCKS_OF[scheme][0]}" if scheme in BLOCKS_OF else ""
    codes = f", activations: {scheme}" if scheme in ("int8", "fp8", "nvfp4") and part in ACTIVATION_PARTS else ""
    for rounding in dict.fromkeys(["", codes]):
        data = f", {DATA}" if rounding else ""
        recipe = write(
            model=f"dtype: {'float32' if scheme == 'bf16' else 'float16'}",
            inputs="images: 1, text_tokens: 8, new_tokens: 8",
            quantize=f"{{{part}: {{weights: {scheme}{block}{rounding}}}{data}}}",
            target=f"device: rtx-5090, runtime: tensorrt-rtx, compute_capabilities: {sorted({capability, '12.0'})}",
        )
        if number(capability) >= number(needs(scheme)):
            make_plan(recipe, files)
            continue
        with pytest.raises(LegalityError) as caught:
            make_plan(recipe, files)
        key = ("model", "dtype") if scheme == "bf16" else ("quantize", part, "weights")
        what = "float32" if scheme == "bf16" else scheme
        text = str(caught.value)
        assert text.startswith(f"{recipe.origin(key)}: {what} does not build for compute capability {capability}"), text
        assert f"it needs {needs(scheme)}" in text and f"leave {capability} out" in text
