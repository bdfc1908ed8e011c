"""Plans of checkpoints that are quantized already: what they say, what they weigh, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests._packed import FORMS
from tmc_export.core.errors import LegalityError, ModelError
from tmc_export.families._contract import ModelFiles
from tmc_export.plan._weights import layer_bytes, weight_bytes
from tmc_export.plan.make import make_plan, report_plan
from tmc_export.plan.notes import emitted_opset
from tmc_export.plan.types import StoredCodes
from tmc_export.recipe import Recipe, load_device

Writer = Callable[..., Recipe]
CPU = "device: cpu, runtime: onnxruntime"


def with_codes(files: ModelFiles, name: str = "gptq", **options: Any) -> ModelFiles:
    """LLaVA-1.5-7B's files, quantized as a form says; `options` change its section."""
    return replace(files, config={**files.config, "quantization_config": {**FORMS[name].config, **options}})


def test_the_plan_says_what_the_checkpoint_brings(files: ModelFiles, write: Writer) -> None:
    report = report_plan(write(target=CPU), with_codes(files, group_size=128))
    scheme = report.plan.quantize["decoder"]
    assert (scheme.weights, scheme.block, scheme.keep, scheme.stored) == ("int4", 128, (), StoredCodes("gptq", 128))
    assert "decoder: the checkpoint's own codes are taken as they are: int4 (gptq, groups of 128)" in report.notes
    assert report.uncompressed is not None and report.uncompressed.quantize == report.plan.quantize
    plain = make_plan(write(target=CPU), files)[0]
    assert "decoder" not in plain.quantize and not any("own codes" in n for n in report_plan(write(target=CPU), files).notes)


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("gptq", {"group_size": 128}, 4 + 16 / 128),
        ("gptq", {"group_size": 32}, 4 + 16 / 32),
        ("gptq", {"group_size": 256}, 4 + 16 / 128),  # stored as blocks of 128
        ("gptq-channels", {}, 4 + 16 / 128),
        ("gptq-8-bits", {"group_size": 64}, 8 + 16 / 64),
        ("awq", {"group_size": 128}, 4 + (16 + 4) / 128),
        ("int8", {}, 8 + 16 / 4096),
        ("fp8", {}, 8 + 16 / 4096),
    ],
)
def test_bytes(name: str, options: dict[str, Any], bits: float, files: ModelFiles, write: Writer) -> None:
    """A LLaMA-7B layer: 4 matrices of 4096 by 4096, 3 of 4096 by 11008, and two norms; codes, float16 scales, zero points."""
    plan = make_plan(write(target=CPU), with_codes(files, name, **options))[0]
    wide, inner = 4096 * 4096, 4096 * 11008
    want = (4 * wide + 3 * inner) * bits / 8 + 2 * 4096 * 2
    if bits == 8 + 16 / 4096:  # down_proj has 11008 input channels to a scale
        want -= 4096 * 2 * (11008 / 4096 - 1)
    assert layer_bytes(plan, 3) == pytest.approx(want, rel=1e-12)
    assert weight_bytes(plan).decoder == 32 * layer_bytes(plan, 3) + 4096 * 2


def test_linears_that_are_left_out_keep_their_bytes(files: ModelFiles, write: Writer) -> None:
    partly = with_codes(files, "awq", modules_to_not_convert=["model.layers.3.mlp.down_proj", "visual"])
    plan = make_plan(write(target=CPU), partly)[0]
    assert plan.quantize["decoder"].keep == ("layers.3.mlp.down_proj",)
    whole = make_plan(write(target=CPU), with_codes(files, "awq"))[0]
    more = layer_bytes(plan, 3) - layer_bytes(whole, 3)
    assert more == 4096 * 11008 * 2 - 4096 * 11008 * (4 + 20 / 32) / 8
    assert layer_bytes(plan, 13) == layer_bytes(plan, 0) == layer_bytes(whole, 0)
    assert any(n.endswith("; 1 linears are not quantized") for n in report_plan(write(target=CPU), partly).notes)


@pytest.mark.parametrize(("group", "block"), [(32, 32), (64, 64), (128, 128), (256, 128), (-1, 128)])
def test_groups_become_blocks(group: int, block: int, files: ModelFiles, write: Writer) -> None:
    report = report_plan(write(target=CPU), with_codes(files, group_size=group))
    assert report.plan.quantize["decoder"].block == block
    assert any("stored as blocks" in n for n in report.notes) == (group not in (32, 64, 128))


@pytest.mark.parametrize("group", [16, 48, 512])
def test_groups_that_are_no_blocks_are_refused(group: int, files: ModelFiles, write: Writer) -> None:
    """16 and 48 are no multiples of 32; 512 does not divide 11008."""
    with pytest.raises(ModelError, match=f"4096, 11008 input channels in groups of {group}.*group_size 32, 64 or 128"):
        make_plan(write(target=CPU), with_codes(files, group_size=group))


def test_quantizing_the_decoder_again_is_refused(files: ModelFiles, write: Writer) -> None:
    recipe = write(quantize="{decoder: {weights: int4, block: 128}}", target=CPU)
    make_plan(recipe, files)
    says = r"recipe.yaml:5:\d+: quantize.decoder: the checkpoint's decoder is already quantized .*int4, gptq.*remove it"
    with pytest.raises(LegalityError, match=says):
        make_plan(recipe, with_codes(files))


def test_other_parts_may_be_quantized_beside_it(files: ModelFiles, write: Writer) -> None:
    plan = make_plan(write(quantize="{encoder: {weights: int8}, head: {weights: int8}}", target=CPU), with_codes(files))[0]
    assert {part: s.stored is not None for part, s in plan.quantize.items()} == {"encoder": False, "decoder": True, "head": False}


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("awq", "device: rtx-4090, runtime: tensorrt-rtx", "int4 .awq, groups of 128, zero points.: TensorRT takes no zero points"),
        ("awq", "device: jetson-agx-orin-64gb, runtime: tensorrt", "TensorRT takes no zero points"),
        ("fp8", "device: jetson-agx-orin-64gb, runtime: tensorrt", "fp8 does not run on 'jetson-agx-orin-64gb'"),
        ("fp8", "device: rtx-a2000-laptop, runtime: tensorrt-rtx", "fp8 does not run on 'rtx-a2000-laptop'"),
        ("gptq", "device: rtx-4090, runtime: tensorrt-rtx, compute_capabilities: ['7.5', '8.9']", "7.5, it needs 8.0; name the unqu"),
    ],
)
def test_what_a_device_does_not_take_is_refused(name: str, target: str, says: str, files: ModelFiles, write: Writer) -> None:
    options = {"group_size": 128} if name in ("gptq", "awq") else {}
    with pytest.raises(LegalityError, match=rf"recipe.yaml:3:\d+: model.source: its decoder is quantized, .*{says}"):
        make_plan(write(target=target), with_codes(files, name, **options))
    make_plan(write(target=CPU), with_codes(files, name, **options))


@pytest.mark.parametrize(
    ("name", "device", "runtime"),
    [("gptq", "rtx-4090", "tensorrt-rtx"), ("gptq-8-bits", "rtx-4090", "tensorrt-rtx"), ("gptq-8-bits", "jetson-agx-orin-64gb", "tensorrt"),
     ("gptq", "jetson-agx-orin-64gb", "tensorrt"), ("fp8", "rtx-4090", "tensorrt-rtx"),
     ("packed", "jetson-agx-orin-64gb", "tensorrt"), ("int8", "rtx-4090", "tensorrt-rtx")],
)  # fmt: skip
def test_what_a_device_takes(name: str, device: str, runtime: str, files: ModelFiles, write: Writer) -> None:
    options = {"group_size": 128} if name == "gptq" else {}
    report = report_plan(write(target=f"device: {device}, runtime: {runtime}"), with_codes(files, name, **options))
    board = runtime == "tensorrt"
    assert any("widens int8 in groups before each product" in n for n in report.notes) == (name == "gptq-8-bits")
    assert any("int8 in blocks" in n for n in report.notes) == (board and name == "gptq-8-bits")
    assert any("the fallback is the unquantized model's float16" in n for n in report.notes) == board


def test_activation_order_is_said(files: ModelFiles, write: Writer) -> None:
    notes = report_plan(write(target=CPU), with_codes(files, desc_act=True)).notes
    assert any("groups are scattered over the input channels" in n for n in notes)
    assert not any("scattered" in n for n in report_plan(write(target=CPU), with_codes(files)).notes)


def test_an_unknown_method_is_refused_by_the_plan(files: ModelFiles, write: Writer) -> None:
    with pytest.raises(ModelError, match="quant_method is 'bitsandbytes', which is not read"):
        make_plan(write(target=CPU), replace(files, config={**files.config, "quantization_config": {"quant_method": "bitsandbytes"}}))


@pytest.mark.parametrize(("ignore", "says"), [([], "covers lm_head"), (["lm_head", "re:.*layers.*"], "covers no linear of the decoder")])
def test_parts_that_are_not_read_are_refused(ignore: list[str], says: str, files: ModelFiles, write: Writer) -> None:
    with pytest.raises(ModelError, match=says):
        make_plan(write(target=CPU), with_codes(files, "packed", ignore=ignore))


def test_what_its_maker_rounds_besides_is_said(files: ModelFiles, write: Writer) -> None:
    notes = report_plan(write(target=CPU), with_codes(files, "int8", kv_cache_scheme={"num_bits": 8, "type": "float"})).notes
    assert "decoder: the checkpoint was made for inputs of products in int8; here they stay in float16" in notes
    assert "decoder: the checkpoint was made for keys and values in fp8; here they stay in float16" in notes
    assert not any("was made for" in n for n in report_plan(write(target=CPU), with_codes(files)).notes)


@pytest.mark.parametrize(("name", "opset"), [("gptq", 21), ("gptq-8-bits", 21), ("int8", 20), ("fp8", 20)])
def test_opset(name: str, opset: int, files: ModelFiles, write: Writer) -> None:
    """Blocks need 21; a scale per channel needs no more than the device's own."""
    device = load_device("jetson-agx-orin-64gb")
    plan = make_plan(write(target=CPU), with_codes(files, name))[0]
    assert device.tensorrt.opset == 20 and emitted_opset(plan, device) == opset
