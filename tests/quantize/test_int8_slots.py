"""int8 slots: what the graphs hold, what the runtime keeps, and that the bundle answers as a reference whose cache is rounded to the same
codes does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes
import pytest

pytest.importorskip("torch")

from tests._tiny import TEXT_ONLY  # noqa: E402
from tests.families._small import save_small_llava  # noqa: E402
from tests.quantize._slots import KV, TEXT_KV, Scales, answered, build_coded, failures, operators, peaks, plan_of, recipe, types  # noqa: E402
from tmc_export.api._slot_codes import slot_codes
from tmc_export.bundle.program import Program, SlotCodes  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.core.errors import BundleError, ExportError, LegalityError  # noqa: E402
from tmc_export.passes import pipeline  # noqa: E402
from tmc_export.passes._decode_attention import decode_attention  # noqa: E402
from tmc_export.passes.attend_by_key import AttendByKeyPass  # noqa: E402
from tmc_export.runtime._backend import Backend, BackendOptions, Graph, open_backend  # noqa: E402
from tmc_export.runtime.session import load  # noqa: E402
from tmc_export.verify.ladder import climb, recorded_ladder  # noqa: E402

LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of two decoder layers, of 4 heads of 16 channels that share 2 keys."""
    made = tmp_path_factory.mktemp("slots")
    save_small_llava(made / "model", "qwen2", layers=LAYERS, vision_layers=2, image_size=42)
    return made


@pytest.fixture(scope="module")
def scales(folder: Path) -> Scales:
    return peaks(folder / "model", recipe(folder, "peaks", quantize="{}"))


@pytest.fixture(scope="module")
def coded(folder: Path, scales: Scales) -> Path:
    return build_coded(recipe(folder, "coded"), folder / "coded", scales, record=True)


# ------------------------------------------------------------------------------------------------------------ what is there
def test_slots_are_int8_in_every_graph_that_has_them(coded: Path) -> None:
    int8 = onnx.TensorProto.INT8
    for block in (0, 1):
        for phase in ("prefill", "chunk", "decode"):
            found = {
                n: t for n, t in types(coded, f"onnx/block_{block}_{phase}.onnx").items() if n.startswith(("past_key", "present", "slots"))
            }
            assert found and set(found.values()) == {int8}, (block, phase)
        assert types(coded, f"engines/block_{block}.onnx")[f"past_key_values.{block}.key"] == int8
    assert types(coded, "onnx/compress_1.onnx")["key.0"] == int8 and operators(coded, "onnx/compress_1.onnx").count("DequantizeLinear") == 1
    assert operators(coded, "onnx/block_0_prefill.onnx").count("QuantizeLinear") == 2
    fused = operators(coded, "onnx/block_1_decode.onnx")
    assert fused.count("GroupQueryAttention") == 1 and not {"QuantizeLinear", "DequantizeLinear", "ScatterND"} & set(fused)


def test_the_runtime_keeps_codes(coded: Path, scales: Scales) -> None:
    session = load(coded, threads=1)
    assert session.program.kv == SlotCodes(dtype="int8", scales={n: tuple(np.float32(s).tolist()) for n, s in scales.items()})
    session.decoder.step(5)
    session.decoder.step(6)
    for slots in session.decoder.slots:
        for name, held in slots.feed().items():
            if name.startswith("past_key"):
                rows = np.asarray(held)
                assert rows.dtype == np.int8 and rows[:, :, :2].any() and not rows[:, :, 2:].any()


# ------------------------------------------------------------------------------------------------------------------ parity
def test_every_rung_holds(coded: Path, folder: Path) -> None:
    ladder = climb(coded, folder / "model", steps=4)
    assert ladder.passed, ladder.text()
    rungs = {r.name: r for r in ladder.rungs}
    assert rungs["quantized"].note.startswith("int8 slots; ") and rungs["onnxruntime end to end"].status == "not run"
    cost = [c for c in rungs["eager with the plan"].checks if c.name.endswith("beside plain slots") and c.metrics is not None]
    assert cost and all(20 < c.metrics.sqnr_db < 50 for c in cost if c.metrics is not None), "rounding is no more than that, and is seen"
    assert rungs["quantized"].worst is not None and rungs["quantized"].worst.sqnr_db > 60
    assert recorded_ladder(coded).passed


@pytest.mark.parametrize("factor", [1.03, 0.97])
def test_other_scales_in_the_manifest_are_found(coded: Path, folder: Path, factor: float) -> None:
    """The negative twin: the reference rounds to other steps than the graphs."""
    program = open_manifest(coded).program
    assert program.kv is not None
    wrong = SlotCodes(dtype="int8", scales={n: tuple(s * factor for s in each) for n, each in program.kv.scales.items()})
    failed = failures(coded, program.model_copy(update={"kv": wrong}), answered(folder / "coded.yaml", folder / "model", wrong))
    assert any("key 0: " in name and "codes differ" in name for name in failed) and any("value 1: " in name for name in failed), failed


def test_a_reference_that_keeps_its_rows_as_they_are_differs(coded: Path, folder: Path) -> None:
    """The negative twin of the rounding, in every phase of every block."""
    program = open_manifest(coded).program
    assert not failures(coded, program, answered(folder / "coded.yaml", folder / "model", program.kv))
    failed = failures(coded, program, answered(folder / "coded.yaml", folder / "model", None))
    named = {name.split(":")[0].split("/")[1] for name in failed if "SQNR" in name}
    assert named >= {f"block {b} {p}" for b in (0, 1) for p in ("prefill", "chunk", "decode")}, failed


class Off:
    """A backend of whose new rows one head's are two codes off."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def graph(self, file: str) -> Any:
        graph: Graph = self.backend.graph(file)

        class Changed:
            def run(self, feed: dict[str, Any]) -> dict[str, np.ndarray]:
                out = graph.run(feed)
                for name in (n for n in out if n.startswith("present.")):
                    out[name] = out[name].copy()
                    out[name][:, 1] = np.clip(out[name][:, 1].astype(int) + 2, -128, 127)
                return out

        return Changed()


def test_rows_two_codes_off_are_found(coded: Path, folder: Path) -> None:
    program = open_manifest(coded).program
    cases = answered(folder / "coded.yaml", folder / "model", program.kv)
    failed = failures(coded, program, cases, Off(open_backend("onnxruntime", coded, BackendOptions())))  # type: ignore[arg-type]
    assert len([name for name in failed if "codes differ, by up to 2" in name]) == 2 * 3 * LAYERS, failed


def test_scales_that_clip_what_comes_are_found(folder: Path, scales: Scales) -> None:
    """The negative twin of what codes cost: a reference that rounds to ranges of a tenth agrees with its bundle, and not with itself."""
    small = {name: tuple(s / 10 for s in each) for name, each in scales.items()}
    ladder = climb(build_coded(recipe(folder, "clipped"), folder / "clipped", small, record=True), folder / "model", steps=4)
    rungs = {r.name: r for r in ladder.rungs}
    assert rungs["onnxruntime per subgraph"].status == rungs["quantized"].status == "passed"
    assert rungs["eager with the plan"].status == "failed"
    assert all(c.name.endswith("beside plain slots") for c in rungs["eager with the plan"].failures)


COMBINATIONS = {
    "next": {"compress": "{at: decoder.1, method: pyramiddrop, layers: [1], keep: [50%]}"},
    "rows": {"compress": "{at: decoder.1, method: tokencarve, keep: 50%}"},
    "sums": {"compress": "{at: decoder.1, method: fitprune, delete: [5]}"},
    "weights": {"quantize": f"{{decoder: {{weights: int8}}, {KV[1:]}"},
    "half": {"dtype": "float16"},
}


@pytest.mark.parametrize("name", [n if n in ("next", "rows", "half") else pytest.param(n, marks=pytest.mark.slow) for n in COMBINATIONS])
def test_what_reads_or_prunes_slots_agrees_with_the_reference(name: str, folder: Path, scales: Scales) -> None:
    path = recipe(folder, name, **COMBINATIONS[name])
    ladder = climb(build_coded(path, folder / name, scales, record=True), folder / "model", steps=4)
    assert ladder.passed, ladder.text()


@pytest.mark.parametrize(
    ("decoder", "options"),
    [("mistral", {"window": 12}), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("qwen3", {}), ("llama", {"kv_heads": 4})))],
)
def test_decoders_of_other_kinds(decoder: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Windows and normed heads decode by standard operators; heads that share no key."""
    save_small_llava(tmp_path / "model", decoder, layers=2, vision_layers=2, image_size=42, **options)
    found = peaks(tmp_path / "model", recipe(tmp_path, "peaks", quantize="{}"))
    bundle = build_coded(recipe(tmp_path, "coded"), tmp_path / "coded", found, record=True)
    fused = "GroupQueryAttention" in operators(bundle, "onnx/block_1_decode.onnx")
    assert fused == (decoder == "llama") and ("ScatterND" in operators(bundle, "onnx/block_1_decode.onnx")) == (not fused)
    ladder = climb(bundle, tmp_path / "model", steps=4)
    assert ladder.passed, ladder.text()


# -------------------------------------------------------------------------------------------------------- the decode graph
class Nothing(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, False)


@pytest.fixture(scope="module")
def both(folder: Path, scales: Scales) -> Iterator[tuple[Path, Path]]:
    """One recipe of text alone, decoding by onnxruntime's operator and by standard ones."""
    path = recipe(folder, "text", quantize=TEXT_KV, text=TEXT_ONLY)
    fused = build_coded(path, folder / "fused", scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "FuseDecodeAttentionPass", Nothing)
        plain = build_coded(path, folder / "plain", scales)
    yield fused, plain


def feed(program: Program, filled: int) -> dict[str, np.ndarray]:
    block, rng = program.blocks[0], np.random.default_rng(0)
    shape = (1, program.kv_heads, block.capacity, program.head_dim)
    past = {f"past_key_values.{i}.{k}": rng.integers(-128, 128, shape, np.int8) for i in range(LAYERS) for k in ("key", "value")}
    order = np.arange(block.capacity)
    return {
        "hidden": rng.standard_normal((1, 1, program.width)).astype(np.float32), "positions": np.full((1, 1, 1), 30),
        "order": np.full((1, 1), 99), "valid": np.ones((1, 1), np.bool_), "past_order": order[None],
        "past_valid": (order < filled)[None], "last": np.zeros(1, np.int64), **past,
    }  # fmt: skip


def opened(bundle: Path) -> tuple[Program, Graph]:
    return open_manifest(bundle).program, open_backend("onnxruntime", bundle, BackendOptions(threads=1)).graph("onnx/block_0_decode.onnx")


def test_products_are_not_made_of_codes(both: tuple[Path, Path]) -> None:
    """onnxruntime's one operator stays, which multiplies codes; float slots of the same graph are rewritten."""
    model = ir.load(both[1] / "onnx/block_0_decode.onnx")
    assert not AttendByKeyPass(10**6, sharing=1, slots=1)(model).modified
    assert [a.key.scales is not None for node in model.graph if (a := decode_attention(node)) is not None] == [True] * LAYERS
    for node in [n for n in model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
    assert AttendByKeyPass(10**6, sharing=1, slots=1)(model).modified


@pytest.mark.parametrize("filled", [0, 1, 17, 47])
def test_both_decode_graphs_give_the_same(both: tuple[Path, Path], filled: int) -> None:
    assert "GroupQueryAttention" in operators(both[0], "onnx/block_0_decode.onnx")
    assert "GroupQueryAttention" not in operators(both[1], "onnx/block_0_decode.onnx")
    (program, fused), (_, plain) = opened(both[0]), opened(both[1])
    x = feed(program, filled)
    got, want = fused.run(x), plain.run(x)
    assert set(got) == set(want) == {"logits", *(f"present.{i}.{k}" for i in range(LAYERS) for k in ("key", "value"))}
    np.testing.assert_allclose(got["logits"], want["logits"], rtol=0, atol=2e-4)
    for name in set(got) - {"logits"}:
        assert got[name].dtype == np.int8 and np.abs(got[name].astype(int) - want[name]).max() <= 1, name
    if filled:
        x["past_key_values.0.key"] = np.where(x["past_key_values.0.key"] > 100, 0, x["past_key_values.0.key"]).astype(np.int8)
        assert np.abs(fused.run(x)["logits"] - want["logits"]).max() > 1e-3  # other codes are seen


@pytest.mark.parametrize("which", [0, 1], ids=["fused", "standard"])
def test_a_step_writes_its_codes_and_nothing_else(both: tuple[Path, Path], which: int) -> None:
    program, graph = opened(both[which])
    x = feed(program, 20)
    before = {name: array.copy() for name, array in x.items()}
    want = graph.run(x)
    assert all((before[name] == array).all() for name, array in x.items())  # `run` leaves its inputs alone
    got = graph.step(x, ()).arrays
    np.testing.assert_array_equal(got["logits"], want["logits"])
    for name in (n for n in x if n.startswith("past_key_values.")):
        before[name][:, :, 20] = want[name.replace("past_key_values", "present")][:, :, 0]
        np.testing.assert_array_equal(x[name], before[name], err_msg=name)


# ----------------------------------------------------------------------------------------------------------------- engines
ENGINE = "target: {device: rtx-5090, runtime: tensorrt-rtx}"


@pytest.fixture(scope="module")
def for_engines(folder: Path, scales: Scales) -> Path:
    path = recipe(folder, "engine", COMBINATIONS["next"]["compress"], dtype="float16")
    path.write_text(path.read_text("utf-8").replace("target: {device: cpu, runtime: onnxruntime}", ENGINE), "utf-8")
    return build_coded(path, folder / "engine", scales)


@pytest.mark.parametrize("capability", ["SM75", "SM89", *(pytest.param(f"SM{n}", marks=pytest.mark.slow) for n in (80, 86, 120, 121))])
def test_tensorrt_rtx_builds_blocks_and_cuts(capability: str, for_engines: Path, tmp_path: Path) -> None:
    """Codes with a scale per head, in and out of an engine; executing it: *not run*. Scores are float32, which 7.5 does not multiply."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    from tmc_export.engine import EngineOptions, build_engine
    from tmc_export.engine._wire import profiles_from

    for spec in json.loads((for_engines / "engines" / "profiles.json").read_text())["subgraphs"]:
        if spec["name"] not in ("block_0", *(["compress_1"] if capability != "SM75" else [])):
            continue
        options, out = EngineOptions(capabilities=(capability,)), tmp_path / f"{spec['name']}.engine"
        report = build_engine(for_engines / spec["onnx"], profiles_from(spec["profiles"]), out, options, precision=spec["precision"])
        assert report.size > 0 and report.capabilities == (capability,)


# ----------------------------------------------------------------------------------------------------------------- refused
def test_scales_that_are_missing_or_odd_are_refused(folder: Path, scales: Scales) -> None:
    path = recipe(folder, "odd")

    def build(given: Scales | None) -> Path:
        return build_coded(path, folder / "odd", given)

    with pytest.raises(
        LegalityError, match="quantize.kv.weights: int8 slots need scales that are found on the calibration data.*remove quantize.kv"
    ):
        build(None)
    with pytest.raises(ExportError, match=r"found for 3 KV tensors, the decoder has 4; first that differs: '1\.value'"):
        build({n: s for n, s in scales.items() if n != "1.value"})
    for odd in ((0.0, 1.0), (float("nan"), 1.0), (1.0,)):
        with pytest.raises(ExportError, match=r"'0\.key' has the scales .*; 2 finite numbers above 0 are needed"):
            build({**scales, "0.key": odd})
    with pytest.raises(ExportError, match="the plan's slots are no codes; leave them out"):
        slot_codes(plan_of(recipe(folder, "none", quantize="{}"), folder / "model"), scales)
    assert not (folder / "odd").exists()


def test_slots_take_no_rows_of_another_type(coded: Path) -> None:
    session = load(coded, threads=1)
    slots = session.decoder.slots[0]
    rows = np.ones((1, session.program.kv_heads, 1, session.program.head_dim), np.float32)
    with pytest.raises(BundleError, match="new rows of float32 do not fit slots of int8"):
        slots.write({"present.0.key": rows, "present.0.value": rows}, np.array([0]))


def test_a_plan_counts_a_byte_a_number(folder: Path) -> None:
    from tmc_export.plan.memory import run_memory

    coded, plain = plan_of(recipe(folder, "bytes"), folder / "model"), plan_of(recipe(folder, "plain", quantize="{}"), folder / "model")
    assert run_memory(plain, "onnxruntime").kv == 4 * run_memory(coded, "onnxruntime").kv
    assert replace(coded, quantize={}) == replace(plain, name=coded.name, quantize={})
