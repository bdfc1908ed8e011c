"""Memory: hand-computed bytes, the table the build formula was fitted to, splits and refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.plan.conftest import TINY, Writer
from tmc_export.core.errors import LegalityError
from tmc_export.engine._memory import estimate_bytes
from tmc_export.families._contract import ModelFiles
from tmc_export.plan._launches import slot_bytes
from tmc_export.plan._weights import block_bytes, decoder_linears, embed_bytes, encoder_weights, projector_weights, weight_bytes, widened
from tmc_export.plan.building import build_memory, builder_of, peak_of_build
from tmc_export.plan.estimate import Clock, estimate
from tmc_export.plan.make import for_this_builder, make_plan, report_plan
from tmc_export.plan.memory import GIB, room_of, run_memory, shared_in_place
from tmc_export.plan.resolve import resolve
from tmc_export.plan.source import read_model_files
from tmc_export.recipe import load_device

SMALL = "text_tokens: 32, new_tokens: 16"
INT8 = "{decoder: {weights: int8}}"
INT4 = "{decoder: {weights: int4, block: 128}}"
NANO = "device: jetson-orin-nano-8gb, runtime: tensorrt, decode_width: 2"


# Weights → peak, GiB, measured with TensorRT-RTX 1.7. Within 10 %: the worst of the four is off by 9 %.
@pytest.mark.parametrize(("weights", "codes", "peak"), [(0.94, None, 3.3), (2.88, None, 8.2), (5.75, None, 14.1), (4.07, "int4", 12.8)])
def test_the_build_formula_is_near_what_was_measured(weights: float, codes: str | None, peak: float) -> None:
    assert peak_of_build(int(weights * GIB), codes) / GIB == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("precision", ["float16", "int8", "fp8", "int4", "nvfp4"])
def test_the_engine_room_reckons_the_same(precision: str) -> None:
    assert peak_of_build(3 * GIB, None if precision == "float16" else precision) == estimate_bytes(3 * GIB, (), precision)


def test_weights_of_7b(write: Writer, files: ModelFiles) -> None:
    plan = resolve(write(), files)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096  # 202,383,360
    found = weight_bytes(plan)
    assert found.decoder == 2 * (32 * layer + 4096)
    assert found.embed == found.head == 2 * 32064 * 4096
    assert (
        encoder_weights(plan.facts) == 23 * 12_596_224 + 3 * 14 * 14 * 1024 + 577 * 1024 + 3 * 1024
    )  # layers, patches, positions, class and norm
    assert projector_weights(plan.facts) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert found.total / 2 == pytest.approx(7.05e9, rel=0.01)


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_16_bits_beside_float32_are_held_as_float32(write: Writer, files: ModelFiles, scheme: str) -> None:
    """As `benchmarks/engine_matrix.py` measures: twice the stored bytes. The token table stays on the CPU as it is stored."""
    target, float32 = "device: jetson-agx-orin-64gb, runtime: tensorrt, decode_width: 2", "dtype: float32"
    quantize = f"{{decoder: {{weights: {scheme}}}, head: {{weights: {scheme}}}}}"
    clock = Clock(1e12, 1e11, ())
    short = resolve(write(model=float32, quantize=quantize, target=target), files)
    wide = resolve(write(model=float32, target=target), files)
    stored, held = weight_bytes(short), weight_bytes(wide)
    assert stored.head == held.head // 2 and stored.embed == held.embed // 2 and stored.decoder < 0.51 * held.decoder
    assert build_memory(short) == build_memory(wide)
    for runtime in ("tensorrt", "onnxruntime"):
        assert run_memory(wide, runtime).weights - run_memory(short, runtime).weights == held.embed - stored.embed
        assert estimate(short, clock, runtime).token_s == estimate(wide, clock, runtime).token_s
    tight = [run_memory(p, "onnxruntime", memory_tight=True).weights for p in (short, wide)]
    assert tight[0] < 0.6 * tight[1]
    parts = stored.decoder + stored.head, held.decoder + held.head
    assert estimate_bytes(parts[0], (), "widened") == pytest.approx(estimate_bytes(parts[1], (), "float32"), rel=0.01)


def test_float16_slots_beside_float32_stay_float16(write: Writer, files: ModelFiles) -> None:
    short, wide = (resolve(write(model="dtype: float32", quantize=q), files) for q in ("{kv: {weights: fp16}}", "{}"))
    assert slot_bytes(widened(short)) * 2 == slot_bytes(widened(wide))


def test_int4_is_half_a_byte_and_a_scale_per_block(write: Writer, files: ModelFiles) -> None:
    plan = resolve(write(quantize=INT4), files)
    linears = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert weight_bytes(plan).decoder == 32 * (linears // 2 + linears // 128 * 2 + 2 * 2 * 4096) + 2 * 4096
    kept = resolve(write(quantize="{decoder: {weights: int4, block: 128, keep: [layers.31.mlp.down_proj]}}"), files)
    down = 4096 * 11008
    assert weight_bytes(kept).decoder - weight_bytes(plan).decoder == down * 2 - down // 2 - down // 128 * 2


def test_one_scale_an_output_channel_and_what_stays(write: Writer, files: ModelFiles) -> None:
    plain = weight_bytes(resolve(write(), files))
    parts = "encoder: {weights: SCHEME}, projector: {weights: SCHEME}, decoder: {weights: SCHEME}"
    linears = 4 * 4096 * 4096 + 3 * 4096 * 11008
    outputs = 4 * 4096 + 2 * 11008 + 4096
    patches, layers = 3 * 14 * 14 * 1024, 23 * (4 * 1024**2 + 2 * 1024 * 4096)
    eight = weight_bytes(resolve(write(quantize=f"{{{parts.replace('SCHEME', 'int8')}, head: {{weights: int8}}}}"), files))
    assert eight.decoder == 32 * (linears + 2 * outputs + 2 * 2 * 4096) + 2 * 4096
    assert eight.embed == eight.head == 32064 * 4096 + 2 * 32064
    assert plain.encoder - eight.encoder == patches + layers - 2 * (1024 + 23 * (5 * 1024 + 4096))
    assert plain.projector - eight.projector == 1024 * 4096 + 4096 * 4096 - 2 * 2 * 4096
    four = weight_bytes(resolve(write(quantize=f"{{{parts.replace('SCHEME', 'nvfp4')}}}"), files))
    assert four.decoder == 32 * (linears // 2 + linears // 16 + 2 * 2 * 4096) + 2 * 4096
    assert plain.encoder - four.encoder == 2 * layers - layers // 2 - layers // 16  # the patch embedding stays
    fp8 = weight_bytes(resolve(write(quantize="{head: {weights: fp8}}"), files))
    assert fp8.embed == plain.embed and fp8.head == eight.head  # no fp8 rows can be looked up


def test_weights_of_the_small_model_are_those_of_its_file(write: Writer) -> None:
    """Counted in the safetensors header; only what the graphs use, so without the norm behind the encoder."""
    import json
    import struct

    with (TINY / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    counted = {"encoder": 0, "projector": 0, "decoder": 0, "embed": 0}
    for name, entry in header.items():
        if name == "__metadata__" or "post_layernorm" in name:
            continue
        count = 1
        for side in entry["shape"]:
            count *= side
        part = "encoder" if "vision" in name else "projector" if "projector" in name else "embed" if "embed_tokens" in name else "decoder"
        counted[part] += count
    found = weight_bytes(resolve(write(model="dtype: float32", inputs=SMALL, target="device: cpu", source=TINY), read_model_files(TINY)))
    assert {
        "encoder": found.encoder // 4,
        "projector": found.projector // 4,
        "decoder": found.decoder // 4,
        "embed": found.embed // 4,
    } == counted
    assert found.head == 0


def test_kv_of_7b(write: Writer, files: ModelFiles) -> None:
    """2 · 32 heads · 128 · 2 bytes = 16 KiB a token and layer; 576 + 128 + 256 slots in 32 layers: 480 MiB."""
    report = report_plan(write("at: projector, method: pool", "at: decoder.2, method: fastv, keep: 50%"), files)
    assert report.uncompressed_cost is not None and report.uncompressed_cost.kv_bytes == (960 * 32 * 16384,)
    assert report.cost.kv_bytes == ((144 + 128 + 256) * 2 * 16384, (72 + 128 + 256) * 30 * 16384)


@pytest.mark.parametrize(
    ("quantize", "dtype", "wide"),
    [
        ("{}", "float32", 4),
        ("{}", "float16", 2),
        ("{kv: {weights: fp16}}", "float16", 2),
        ("{kv: {weights: int8}}", "float32", 1),
        ("{kv: {weights: int8}}", "float16", 1),
    ],
)
def test_bytes_of_a_slot(quantize: str, dtype: str, wide: int, write: Writer, files: ModelFiles) -> None:
    plan = resolve(write(model=f"dtype: {dtype}", quantize=quantize), files)
    assert slot_bytes(plan) == 2 * 32 * 128 * wide


def test_copies(write: Writer, files: ModelFiles) -> None:
    tiny = read_model_files(TINY)
    small = resolve(write(model="dtype: float32", inputs=SMALL, target="device: cpu", source=TINY), tiny)
    three, one = run_memory(small, "onnxruntime"), run_memory(small, "onnxruntime", memory_tight=True)
    decoder = sum(block_bytes(small, b) for b in small.blocks)
    assert (three.copies, one.copies) == (3, 1) and three.weights - one.weights == 2 * decoder + embed_bytes(small)
    assert one.activations < three.activations  # phases do not run at once, and nothing is kept between runs
    half = resolve(write(model="dtype: float16", inputs=SMALL, target="device: cpu", source=TINY), tiny)
    tight, d = run_memory(half, "onnxruntime", memory_tight=True), half.facts.decoder
    assert tight.copies == 1 and 2 * (tight.weights - 4 * d.width * max(d.vocabulary, d.intermediate)) == one.weights
    codes = resolve(write(model="dtype: float32", inputs=SMALL, target="device: cpu", quantize=INT8, source=TINY), tiny)
    assert shared_in_place(small) and shared_in_place(half) and not shared_in_place(codes)
    spared = decoder - sum(block_bytes(codes, b) for b in codes.blocks)
    runs = {k: d.layers * sum(-(-into // k) * out for into, out in decoder_linears(d).values()) for k in (32, 128)}
    beside = run_memory(codes, "onnxruntime", memory_tight=True).weights - (one.weights - spared)
    assert beside == 8 * runs[128], "a sum and a scale of each run of codes"
    assert run_memory(codes, "onnxruntime").weights == three.weights - 3 * spared + 3 * 8 * runs[32]
    assert run_memory(half, "onnxruntime").weights - embed_bytes(half) == three.weights - embed_bytes(small)
    plan = resolve(write(), files)
    assert run_memory(plan, "tensorrt").copies == 2
    wide = resolve(write(target="device: jetson-agx-orin-64gb, runtime: tensorrt, decode_width: 2"), files)
    assert run_memory(plan, "tensorrt").weights - run_memory(wide, "tensorrt").weights == sum(block_bytes(plan, b) for b in plan.blocks)


def test_7b_does_not_run_on_8_gib(write: Writer, files: ModelFiles) -> None:
    recipe = write(target="device: jetson-orin-nano-8gb, runtime: tensorrt, decode_width: 2")
    with pytest.raises(LegalityError) as caught:
        make_plan(recipe, files)
    text = str(caught.value)
    assert caught.value.exit_code == 3 and f"{recipe.origin().file}:6:18: " in text
    assert "weights 13.1 GiB" in text and "KV 0.5 GiB" in text and "6.5 GiB (8.0 GiB, less 1.5 GiB for the system)" in text
    assert "write quantize: {decoder: {weights: int4" in text
    with pytest.raises(LegalityError, match=r"weights 7\.5 GiB \(2 copies of the decoder's\).*set target.decode_width: 2"):
        make_plan(write(quantize=INT4, target="device: jetson-orin-nano-8gb, runtime: tensorrt, decode_width: 1"), files)


def test_blocks_are_cut_further_until_their_engines_can_be_built(write: Writer, files: ModelFiles) -> None:
    recipe = write("at: decoder.2, method: fastv, keep: 50%", quantize=INT4, target=NANO)
    plan, splits = make_plan(recipe, files)
    room = room_of(load_device("jetson-orin-nano-8gb"), "tensorrt")
    assert room is not None and splits == (17,)
    assert [(b.first, b.last) for b in plan.blocks] == [(0, 2), (2, 17), (17, 32)]
    assert (
        max(engine.peak for engine in build_memory(plan)) <= room.free < max(engine.peak for engine in build_memory(resolve(recipe, files)))
    )
    assert [c.layer for c in plan.cuts] == [2] and plan.blocks[1].tokens == plan.blocks[2].tokens
    assert plan.blocks[0].query_rows == {1: "last"} and not plan.blocks[1].head and plan.blocks[2].head


RTX = "device: rtx-4090, runtime: tensorrt-rtx"


def test_the_memory_of_the_card_does_not_bound_the_build(write: Writer, files: ModelFiles) -> None:
    """TensorRT-RTX engines are built elsewhere: while nobody says where, nothing is cut."""
    recipe = write(target=RTX)
    assert make_plan(recipe, files)[1] == () and builder_of(recipe, load_device("rtx-4090")) is None


@pytest.mark.parametrize(
    ("memory", "quantize", "splits"),
    [
        (64, "{}", ()),
        (23.5, "{}", (17,)),  # 30 layers of fp16 are 11.6 GiB, 28.5 to build; half of them with the head fit 21.5
        (12, "{}", (9, 17, 24)),
        (8, "{}", (7, 12, 17, 22, 27)),
        (23.5, INT4, ()),
        (12, INT4, (17,)),
        (6, INT4, (9, 17, 24)),
        (4.5, INT4, (5, 8, 11, 14, 17, 20, 23, 26, 29)),
    ],
)
def test_a_smaller_machine_gets_more_blocks(
    memory: float, quantize: str, splits: tuple[int, ...], write: Writer, files: ModelFiles
) -> None:
    recipe = write("at: decoder.2, method: fastv, keep: 50%", quantize=quantize, target=f"{RTX}, build_memory_gib: {memory}")
    plan, found = make_plan(recipe, files)
    assert found == splits
    assert [(b.first, b.last) for b in plan.blocks] == list(pairwise((0, 2, *splits, 32)))
    free = int((memory - 2) * GIB)
    assert max(engine.peak for engine in build_memory(plan)) <= free
    if splits:  # one block fewer would not do
        pieces = len(splits)
        edges = (0, 2, *(2 + 30 * i // pieces for i in range(1, pieces)), 32)
        assert max(engine.peak for engine in build_memory(resolve(recipe, files, edges[2:-1]))) > free


def test_a_machine_too_small_for_any_cut(write: Writer, files: ModelFiles) -> None:
    for memory, model, says in (
        (
            4.2,
            "dtype: float16",
            r"a single decoder layer .*the machine that builds has 2\.2 GiB \(4\.2 GiB, less 2\.0 GiB.*quantize to int4, or build",
        ),
        (5, "dtype: float32", r"vision_0 .*the machine that builds has 3\.0 GiB .*write model\.dtype: float16, or build on a machine"),
    ):
        with pytest.raises(LegalityError, match=says):
            make_plan(write(model=model, target=f"{RTX}, build_memory_gib: {memory}"), files)


def test_a_board_may_be_given_less_than_it_has(write: Writer, files: ModelFiles) -> None:
    recipe = write("at: decoder.2, method: fastv, keep: 50%", quantize=INT4, target=f"{NANO}, build_memory_gib: 6")
    assert len(make_plan(recipe, files)[1]) > 1


def test_this_machine_builds_where_nobody_else_is_named(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmc_export.plan.make.total_bytes", lambda: int(15.77 * GIB))
    assert for_this_builder(write(target=RTX)).target.build_memory_gib == 15.7
    assert for_this_builder(write(target=f"{RTX}, build_memory_gib: 8")).target.build_memory_gib == 8
    assert for_this_builder(write(target=NANO)).target.build_memory_gib is None
    monkeypatch.setattr("tmc_export.plan.make.total_bytes", lambda: None)
    assert for_this_builder(write(target=RTX)).target.build_memory_gib is None


def test_too_small_for_a_single_layer(write: Writer, files: ModelFiles, tmp_path: Path, repository: Path) -> None:
    text = (repository / "devices" / "jetson-orin-nano-8gb.yaml").read_text("utf-8")
    text = text.replace("name: jetson-orin-nano-8gb", "name: small").replace("{value: 8,", "{value: VALUE,")
    for value, says in (("2.2", "vision_0"), ("3.39", "single decoder layer")):
        (tmp_path / "small.yaml").write_text(text.replace("VALUE", value), "utf-8")
        with pytest.raises(LegalityError, match=rf":6:18: building .*{says}.*choose a device with more memory"):
            make_plan(
                write(model="dtype: float32" if says == "vision_0" else "dtype: float16", target="device: ./small.yaml, runtime: tensorrt"),
                files,
            )


@pytest.mark.parametrize(
    ("device", "runtime", "free"),
    [
        ("cpu", "onnxruntime", None),
        ("rtx-4090", "onnxruntime", None),
        ("rtx-4090", "tensorrt-rtx", 23.5),
        ("jetson-agx-orin-64gb", "onnxruntime", 59.16),
    ],
)
def test_room(device: str, runtime: str, free: float | None) -> None:
    room = room_of(load_device(device), runtime)
    assert (room is None) == (free is None)
    assert room is None or room.free / GIB == pytest.approx(free)
