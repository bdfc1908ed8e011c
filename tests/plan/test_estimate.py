"""Operations, times and bounds against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.conftest import Writer
from tmc_export.core.facts import DecoderFacts
from tmc_export.families._contract import ModelFiles
from tmc_export.graphs._contract import Attention, Need, Site
from tmc_export.plan._flops import (
    CutFlops,
    LayerTokens,
    cut_flops,
    decoder_layer_flops,
    encoder_flops,
    head_flops,
    projector_flops,
    vision_tokens,
)
from tmc_export.plan._launches import decode_launches, prompt_launches
from tmc_export.plan.estimate import Clock, clock_of, estimate, shares_of
from tmc_export.plan.make import report_plan
from tmc_export.plan.resolve import resolve
from tmc_export.recipe import load_device

N, D, M, LAYERS = 704, 4096, 11008, 32  # 576 visual and 128 text tokens


def paper(n: int, matrices: int = 3) -> int:
    """FastV's formula for a layer, in multiply-adds: 4nd² + 2n²d + 2ndm; Llama's gated part has a third matrix."""
    return 4 * n * D * D + 2 * n * n * D + matrices * n * D * M


def test_a_layer_is_fastvs_formula(write: Writer, files: ModelFiles) -> None:
    facts = resolve(write(), files).facts.decoder
    assert decoder_layer_flops(facts, N, N) == 2 * paper(N) == 293_064_409_088


def test_fastv_saves_what_its_formula_says(write: Writer, files: ModelFiles) -> None:
    report = report_plan(write("at: decoder.2, method: fastv, keep: 50%"), files)
    assert report.uncompressed_cost is not None
    ratio = (2 * paper(N) + 30 * paper(N - 288)) / (LAYERS * paper(N))
    assert report.cost.flops["prefill"] / report.uncompressed_cost.flops["prefill"] == pytest.approx(ratio, rel=1e-12)
    assert ratio == pytest.approx(0.61, abs=0.01)


def test_grouped_heads_and_past_keys() -> None:
    d = DecoderFacts(24, 896, 14, 2, 64, 4864, 151936, 1, True, 32768)
    by_hand = 2 * (896 * 896 * 2 + 896 * 128 * 2) + 4 * 1000 * 896 + 6 * 896 * 4864
    assert decoder_layer_flops(d, 1, 1000) == by_hand
    assert head_flops(d) == 2 * 896 * 151936


def test_the_encoder_layer_by_layer(write: Writer, files: ModelFiles) -> None:
    plain = resolve(write(), files).vision[0]
    layer = 2 * (4 * 577 * 1024**2 + 2 * 577**2 * 1024 + 2 * 577 * 1024 * 4096)
    patches = 2 * 576 * 3 * 14 * 14 * 1024
    assert encoder_flops(plain.facts, vision_tokens(plain).layers) == 23 * layer + patches
    assert projector_flops(plain.facts, vision_tokens(plain).projected) == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    merged = resolve(write("at: encoder.3.mid, method: tome, r: 100", "at: encoder.20, method: random, keep: 77"), files).vision[0]
    tokens = vision_tokens(merged)
    assert (
        tokens.layers[2] == LayerTokens(577, 577)
        and tokens.layers[3] == LayerTokens(577, 477)
        and tokens.layers[4] == LayerTokens(477, 477)
    )
    assert [t.attention for t in tokens.layers[19:22]] == [
        477,
        477 - (477 - merged.stages[-1].after.tokens),
        merged.stages[-1].after.tokens,
    ]
    assert tokens.projected == merged.tokens
    zipped = resolve(write("at: encoder, method: visionzip"), files).vision[0]
    assert vision_tokens(zipped).layers == vision_tokens(plain).layers and vision_tokens(zipped).projected == 64


def test_cuts(write: Writer, files: ModelFiles) -> None:
    plan = resolve(write("at: decoder.2, method: fastv, keep: 50%"), files)
    fastv = cut_flops(plan, plan.cuts[0])
    assert fastv.scores == 2 * (N + 256) * 4096  # one query row of all heads against the slots of the layer before
    assert fastv.duplicated == 0
    dropped = resolve(write("at: decoder.8, method: pyramiddrop"), files)
    costs = [cut_flops(dropped, cut) for cut in dropped.cuts]
    assert [c.tokens_in for c in dropped.cuts] == [128 + 576, 128 + 288, 128 + 144]
    assert [c.duplicated for c in costs] == [2 * n * 4096 * 8192 for n in (704, 416, 272)]
    report = report_plan(write("at: decoder.8, method: pyramiddrop"), files)
    assert report.cost.duplicated_flops == sum(c.duplicated for c in costs)
    assert report.cost.weights.cuts == 3 * 2 * (2 * 4096 * 4096 + 4096)


def test_rows_of_a_cut(write: Writer, files: ModelFiles) -> None:
    """704 tokens at the cut, 128 of them text; 960 slots in the layer before it."""
    plan = resolve(write("at: decoder.2, method: fastv, keep: 50%"), files)
    cut = plan.cuts[0]
    text, visual = Attention(rows="text", heads="max", row_sum=True), Attention(rows="visual", heads="max", row_sum=True)

    def cost(*needs: Need) -> CutFlops:
        stage = replace(cut.stages[0], stage=replace(cut.stages[0].stage, needs=needs))
        return cut_flops(plan, replace(cut, stages=(stage,)))

    assert cost(text).scores == cost(Attention(rows="text")).scores == 2 * 128 * 960 * 4096
    assert cost(text, visual).scores == cost(visual).scores == 2 * N * 960 * 4096, "one pass serves both sums"
    assert cost(Attention(rows="window", window=8), Attention(rows="last")).scores == 2 * 9 * 960 * 4096
    ahead = cost(replace(text, layer="next"))
    assert (ahead.previous, ahead.following) == ((0, 0), (128, (128 + 288 + 256) + N))
    assert ahead.scores == 2 * 128 * (672 + N) * 4096 and ahead.duplicated == 2 * N * 4096 * 8192


def test_tokens_through_pool_and_fastv(write: Writer, files: ModelFiles) -> None:
    report = report_plan(write("at: projector, method: pool, kernel: 2", "at: decoder.2, method: fastv, keep: 50%"), files)
    assert report.plan.vision[0].tokens == 144
    assert [(b.tokens, b.capacity) for b in report.plan.blocks] == [(144 + 128, 144 + 128 + 256), (72 + 128, 72 + 128 + 256)]
    assert report.cost.prompt_dispatches == 5  # picture, embedding, block, cut, block
    assert report.cost.token_dispatches == 3


def test_a_token_costs_its_slots(write: Writer, files: ModelFiles) -> None:
    plan = resolve(write(), files)
    block = next(x for x in decode_launches(plan, 1) if x.name == "block_0")
    assert block.flops == 32 * decoder_layer_flops(plan.facts.decoder, 1, 961) + head_flops(plan.facts.decoder)
    weights = 2 * (32 * (4 * D * D + 3 * D * M + 2 * D) + D + D * 32064)
    assert block.moved_bytes == weights + 32 * 961 * 16384 + 2 * D + 2 * 32064


def test_the_roofline(write: Writer, files: ModelFiles) -> None:
    """7B in fp16 on 204.8 GB/s: a token reads 13.7 GB, about 67 ms; a prompt of 9.4 + 0.4 TFLOP on 42.5 TFLOPS takes about 230 ms."""
    plan = resolve(write(), files)
    device = load_device("jetson-agx-orin-64gb")
    clock = clock_of(plan, device, "tensorrt")
    assert clock.unverified == ("tflops.fp16", "memory_bandwidth_gb_s")
    cost = estimate(plan, clock, "tensorrt")
    decode = sum(x.moved_bytes for x in decode_launches(plan, 1))
    assert cost.token_s == pytest.approx(decode / 204.8e9) == pytest.approx(0.0673, abs=0.001)
    prompt = [x for x in prompt_launches(plan) if x.name != "embed"]
    assert cost.first_token_s == pytest.approx(sum(x.flops for x in prompt) / 42.5e12, rel=1e-3)
    assert cost.answer_s == pytest.approx((cost.first_token_s or 0) + 255 * (cost.token_s or 0))
    bound = Clock(1e30, 204.8e9)
    assert estimate(plan, bound, "tensorrt").first_token_s == pytest.approx(sum(x.moved_bytes for x in prompt_launches(plan)) / 204.8e9)


def test_no_figures_no_times(write: Writer, files: ModelFiles) -> None:
    plan = resolve(write(), files)
    for device, runtime, says in (
        ("cpu", "onnxruntime", "no figure for tflops.fp16 and memory_bandwidth_gb_s"),
        ("rtx-4090", "onnxruntime", "the device's figures are its GPU's"),
    ):
        clock = clock_of(plan, load_device(device), runtime)
        cost = estimate(plan, clock, runtime)
        assert says in clock.why_not and (cost.first_token_s, cost.token_s, cost.answer_s) == (None, None, None)
        assert shares_of(plan, clock, runtime).basis == "operations"
    single = clock_of(replace(plan, dtype="float32"), load_device("rtx-4090"), "tensorrt-rtx")
    assert "no figure for tflops.fp32" in single.why_not


def test_shares_and_the_bound(write: Writer, files: ModelFiles) -> None:
    plan = resolve(write(), files)
    clock = Clock(1e12, 1e30)  # time is operations
    found = shares_of(plan, clock, "tensorrt", ((0, Site.parse("decoder.2")), (1, Site.parse("projector")), (2, Site.parse("input"))))
    encoder = prompt_launches(plan)[0].flops
    prefill = LAYERS * 2 * paper(N) + head_flops(plan.facts.decoder)
    decode = 255 * sum(x.flops for x in decode_launches(plan, 1))
    assert found.encoder + found.prefill + found.decode == pytest.approx(1)
    assert found.prefill == pytest.approx(prefill / (encoder + prefill + decode))
    left = encoder + 2 * 2 * paper(N) + 30 * 2 * paper(128) + head_flops(plan.facts.decoder)
    assert found.limits[0][:2] == (0, "decoder.2")
    assert found.limits[0][2] == pytest.approx((encoder + prefill) / left)
    assert found.limits[1][2] == pytest.approx((encoder + prefill) / (encoder + LAYERS * 2 * paper(128) + head_flops(plan.facts.decoder)))
    assert found.limits[2][2] > found.limits[1][2] > found.limits[0][2] > 1


@pytest.mark.parametrize(
    "entry",
    [
        "at: decoder.2, method: fastv, keep: 1",
        "at: projector, method: random, keep: 1",
        "at: encoder, method: visionzip, dominant: 2, contextual: 1",
        "at: encoder.3.mid, method: tome, r: 288",
        "at: input, method: downsample, grid: [2, 2]",
    ],
)
def test_no_recipe_beats_its_bound(entry: str, write: Writer, files: ModelFiles) -> None:
    report = report_plan(write(entry), files)
    full, cost = report.uncompressed_cost, report.cost
    assert report.amdahl is not None and full is not None
    assert full.first_token_s and cost.first_token_s and full.answer_s and cost.answer_s
    _, _, first, answer = report.amdahl.limits[0]
    assert 1 < full.first_token_s / cost.first_token_s < first
    assert 1 < full.answer_s / cost.answer_s < answer


def test_a_prompt_that_only_fits_compressed(write: Writer, files: ModelFiles) -> None:
    recipe = write("at: projector, method: pool", inputs="images: 7, text_tokens: 128, new_tokens: 64")
    report = report_plan(recipe, files)
    assert report.uncompressed is None and report.amdahl is None and "4224 tokens" in report.why_not


def test_notes(write: Writer, files: ModelFiles) -> None:
    int4 = "{decoder: {weights: int4, block: 128}}"
    notes = " | ".join(report_plan(write(quantize=int4), files).notes)
    assert "int4 on TensorRT 10.3: not run; the fallback is float16 weights (" in notes and "opset 21: not run on a board" in notes
    tight = "device: jetson-orin-nano-8gb, runtime: tensorrt, decode_width: 2"
    assert "no fallback: float16 weights would take" in " | ".join(report_plan(write(quantize=int4, target=tight), files).notes)
    eight = "{encoder: {weights: int8}, decoder: {weights: int8}, head: {weights: int8}}"
    board = " | ".join(report_plan(write(quantize=eight), files).notes)
    assert "int8 on TensorRT 10.3: not run; the fallback is float16 weights (" in board and "opset" not in board
    thor = {"target": "device: jetson-agx-thor, runtime: tensorrt"}
    four = " | ".join(report_plan(write(quantize="{encoder: {weights: nvfp4}, head: {weights: fp8}}", **thor), files).notes)
    assert "opset 20, the graphs are opset 23: not run" in four and "nvfp4 on TensorRT 10.13: not run" in four
    assert "the patch embedding stays in float16" in four and "the token table stays in float16" in four
    assert "onnxruntime does not execute nvfp4" in four and "the patch embedding" not in board
    assert "widens nvfp4 weights alone" in four
    both = "{encoder: {weights: nvfp4, activations: nvfp4}, calibration: {images: a, prompts: b.jsonl}}"
    codes = " | ".join(report_plan(write(quantize=both, **thor), files).notes)
    assert "onnxruntime does not execute nvfp4" in codes and "widens" not in codes
    rtx = {
        "model": "dtype: float32",
        "target": "device: rtx-5090, runtime: tensorrt-rtx",
        "inputs": "images: 1, text_tokens: 8, new_tokens: 8",
    }
    for name in ("fp16", "bf16"):
        found = " | ".join(report_plan(write(quantize=f"{{encoder: {{weights: {name}}}}}", **rtx), files).notes)
        assert f"widens {name} weights as it builds" in found
    assert "as it builds" not in four
    slow = " | ".join(report_plan(write(quantize=eight.replace("decoder: {weights: int8}", "decoder: {weights: fp8}"),
                                        target="device: cpu, runtime: onnxruntime"), files).notes)  # fmt: skip
    assert "widens fp8 of the decoder in each run" in slow and "widens int8 of the head in each run" in slow
    kv = {"quantize": "{kv: {weights: int8}, calibration: {images: a, prompts: b.jsonl}}", "target": "device: cpu, runtime: onnxruntime"}
    assert "onnxruntime widens int8 slots in each run" in " | ".join(report_plan(write(**kv), files).notes)
    assert "widens" not in " | ".join(report_plan(write(model="dtype: float32", **kv), files).notes)
    kv["quantize"] = kv["quantize"].replace("int8", "fp8")
    eighth = " | ".join(report_plan(write(model="dtype: float32", **kv), files).notes)
    assert "onnxruntime widens fp8 slots in each run" in eighth and "fp8 of the" not in eighth
    given = "calibration: {images: a, prompts: b.jsonl, observer: percentile, samples: 7}"
    eight = "{weights: int8, activations: int8, smooth: 0.5, keep: [q_proj]}"
    ranges = report_plan(write(quantize=f"{{encoder: {eight}, decoder: {eight}, {given}}}"), files).notes
    assert "encoder, decoder: int8 weights, beside int8 inputs, smoothed by 0.5; kept: q_proj" in ranges
    assert "calibration: at most 7 questions of 'b.jsonl' are answered in float32, after compression; ranges by percentile 99.99" in ranges
    awq = report_plan(write(quantize=f"{{decoder: {{weights: int4, block: 64, algorithm: awq}}, {given}}}"), files).notes
    assert "decoder: int4 weights in blocks of 64, by awq" in awq and not any("ranges" in note for note in awq)
    cpu = " | ".join(report_plan(write(target="device: rtx-4090, runtime: onnxruntime, memory_tight: true"), files).notes)
    wide = " | ".join(report_plan(write(target="device: cpu, runtime: onnxruntime, decode_width: 2"), files).notes)
    assert "decode_width has no effect" in wide and "decode_width" not in cpu
    assert "runs on the CPU of 'rtx-4090'" in cpu and "turned into float32 by every run" in cpu and "memory is not checked here" in cpu
    codes = {"quantize": int4, "model": "dtype: float32", "target": "device: cpu, runtime: onnxruntime, memory_tight: true"}
    turns = " | ".join(report_plan(write(**codes), files).notes)
    assert "memory_tight shares only floating-point" in turns and "by every run" not in turns and "memory_tight shares" not in cpu
    coarser, tight = "in runs of 128 instead of 32", {**codes, "quantize": "{decoder: {weights: int8}}"}
    assert coarser in " | ".join(report_plan(write(**tight), files).notes) and coarser not in turns + cpu
    assert coarser not in " | ".join(report_plan(write(**{**tight, "target": "device: cpu, runtime: onnxruntime"}), files).notes)
    for half in ("{head: {weights: fp16}}", "{decoder: {weights: fp16}}"):
        assert "by every run" in " | ".join(report_plan(write(**{**codes, "quantize": half}), files).notes)
