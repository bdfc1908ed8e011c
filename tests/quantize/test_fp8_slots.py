"""Slots of fp8 codes: what the graphs hold, what the runtime keeps, that `verify` passes such bundles and fails on wrong ones, and that
TensorRT-RTX builds engines of them. Whole conversations beside Hugging Face's model: `tests/end_to_end/test_fp8_slots.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

from tests._tiny import RECIPE, tmc  # noqa: E402
from tests.families._small import save_small_llava  # noqa: E402
from tests.quantize._slots import Scales, answered, build_coded, failures, kv, operators, peaks, plan_of, recipe, types  # noqa: E402
from tmc_export.bundle.program import SlotCodes  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.core.errors import BundleError, ExportError, LegalityError  # noqa: E402
from tmc_export.plan.memory import run_memory  # noqa: E402
from tmc_export.plan.notes import TRACED  # noqa: E402
from tmc_export.runtime._backend import Backend, BackendOptions, Graph, open_backend  # noqa: E402
from tmc_export.runtime.session import load  # noqa: E402
from tmc_export.verify.ladder import climb, recorded_ladder  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")  # one model under many recipes

KV = kv("fp8")
LAYERS = 2
FP8 = onnx.TensorProto.FLOAT8E4M3FN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of two decoder layers, of 4 heads of 16 channels that share 2 keys."""
    made = tmp_path_factory.mktemp("slots")
    save_small_llava(made / "model", "qwen2", layers=LAYERS, vision_layers=2, image_size=42)
    return made


@pytest.fixture(scope="module")
def scales(folder: Path) -> Scales:
    return peaks(folder / "model", recipe(folder, "peaks", quantize="{}"), "fp8")


@pytest.fixture(scope="module")
def coded(folder: Path, scales: Scales) -> Path:
    return build_coded(recipe(folder, "coded", quantize=KV), folder / "coded", scales, record=True)


# ------------------------------------------------------------------------------------------------------------ what is there
def test_why_codes_are_widened_before_they_are_joined() -> None:
    """What fills slots takes int8 and no fp8, in the opset that graphs have; what widens and makes codes takes both."""

    def taken(operator: str, name: str) -> list[str]:
        return next(c.allowed_type_strs for c in onnx.defs.get_schema(operator, TRACED).type_constraints if c.type_param_str == name)

    for operator in ("Concat", "ScatterND"):
        assert "tensor(int8)" in taken(operator, "T") and "tensor(float8e4m3fn)" not in taken(operator, "T")
    assert "tensor(float8e4m3fn)" in taken("DequantizeLinear", "T1") and "tensor(float8e4m3fn)" in taken("QuantizeLinear", "T2")


def test_slots_are_fp8_in_every_graph_that_has_them(coded: Path) -> None:
    for block in (0, 1):
        for phase in ("prefill", "chunk", "decode"):
            found = {n: t for n, t in types(coded, f"onnx/block_{block}_{phase}.onnx").items() if n.startswith(("past_key", "present"))}
            assert len(found) == (2 if phase == "prefill" else 4) and set(found.values()) == {FP8}, (block, phase)
        assert types(coded, f"engines/block_{block}.onnx")[f"past_key_values.{block}.key"] == FP8
    assert types(coded, "onnx/compress_1.onnx")["key.0"] == FP8 and operators(coded, "onnx/compress_1.onnx").count("DequantizeLinear") == 1
    wide = {phase: operators(coded, f"onnx/block_0_{phase}.onnx").count("DequantizeLinear") for phase in ("prefill", "chunk", "decode")}
    assert wide == {"prefill": 2, "chunk": 4, "decode": 4}
    for phase in ("prefill", "chunk", "decode"):
        assert operators(coded, f"onnx/block_0_{phase}.onnx").count("QuantizeLinear") == 2
    step = operators(coded, "onnx/block_1_decode.onnx")  # onnxruntime's operator for attention takes no fp8
    assert "GroupQueryAttention" not in step and step.count("ScatterND") == 2


def test_the_runtime_keeps_codes_as_bytes(coded: Path, scales: Scales) -> None:
    session = load(coded, threads=1)
    assert session.program.kv == SlotCodes(dtype="fp8", scales={n: tuple(np.float32(s).tolist()) for n, s in scales.items()})
    session.decoder.step(5)
    session.decoder.step(6)
    for slots in session.decoder.slots:
        for name, held in slots.feed().items():
            if name.startswith("past_key"):
                rows = np.asarray(held)
                assert rows.dtype == np.uint8 and rows[:, :, :2].any() and not rows[:, :, 2:].any()


def test_a_step_returns_its_codes_and_leaves_the_slots_alone(coded: Path) -> None:
    session = load(coded, threads=1)
    program, block = session.program, session.program.blocks[0]
    graph, rng = open_backend("onnxruntime", coded, BackendOptions(threads=1)).graph("onnx/block_0_decode.onnx"), np.random.default_rng(0)
    shape, order = (1, program.kv_heads, block.capacity, program.head_dim), np.arange(block.capacity)
    past = {f"past_key_values.0.{kind}": rng.integers(0, 0x7F, shape, np.uint8) for kind in ("key", "value")}
    feed = {
        "hidden": rng.standard_normal((1, 1, program.width)).astype(np.float32), "positions": np.full((1, 1, 1), 30),
        "order": np.full((1, 1), 99), "valid": np.ones((1, 1), np.bool_), "past_order": order[None], "past_valid": (order < 20)[None],
        "last": np.zeros(1, np.int64), **past,
    }  # fmt: skip
    before = {name: array.copy() for name, array in feed.items()}
    want, got = graph.run(feed), graph.step(feed, ()).arrays
    for name in ("hidden_out", "present.0.key", "present.0.value"):
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert got["present.0.key"].dtype == np.uint8 and got["present.0.key"].shape == (1, program.kv_heads, 1, program.head_dim)
    assert all((before[name] == array).all() for name, array in feed.items())
    feed["past_key_values.0.value"] = past["past_key_values.0.value"] ^ 0x80  # other codes are seen
    assert np.abs(graph.step(feed, ()).arrays["hidden_out"] - want["hidden_out"]).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------------ parity
def test_every_rung_holds(coded: Path, folder: Path) -> None:
    ladder = climb(coded, folder / "model", steps=4)
    assert ladder.passed, ladder.text()
    rungs = {r.name: r for r in ladder.rungs}
    assert rungs["quantized"].note.startswith("fp8 slots; ") and rungs["onnxruntime end to end"].status == "not run"
    cost = [c for c in rungs["eager with the plan"].checks if c.name.endswith("beside plain slots") and c.metrics is not None]
    assert cost and all(15 < c.metrics.sqnr_db < 40 for c in cost if c.metrics is not None), "rounding is no more than that, and is seen"
    assert rungs["quantized"].worst is not None and rungs["quantized"].worst.sqnr_db > 55
    assert recorded_ladder(coded).passed


def scaled(codes: SlotCodes, factor: float) -> SlotCodes:
    return SlotCodes(dtype="fp8", scales={n: tuple(s * factor for s in each) for n, each in codes.scales.items()})


@pytest.mark.parametrize("factor", [1.03, 0.97])
def test_other_scales_in_the_manifest_are_found(coded: Path, folder: Path, factor: float) -> None:
    """The negative twin: the reference rounds to other steps than the graphs."""
    program = open_manifest(coded).program
    assert program.kv is not None
    wrong = scaled(program.kv, factor)
    failed = failures(coded, program.model_copy(update={"kv": wrong}), answered(folder / "coded.yaml", folder / "model", wrong))
    assert any("key 0: " in name and "codes differ" in name for name in failed) and any("value 1: " in name for name in failed), failed


def test_the_command_passes_the_bundle_and_fails_a_tampered_one(coded: Path, folder: Path, tmp_path: Path) -> None:
    """By hand: scales in the manifest that are not the graphs', which no sha256 covers; and a graph that is another."""
    import shutil

    assert tmc("verify", coded, "--model", folder / "model").code == 0
    wrong = Path(shutil.copytree(coded, tmp_path / "wrong"))
    manifest = json.loads((wrong / "manifest.json").read_text("utf-8"))
    manifest["program"]["kv"]["scales"] = {n: [s * 1.1 for s in each] for n, each in manifest["program"]["kv"]["scales"].items()}
    (wrong / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    ran = tmc("verify", wrong, "--model", folder / "model")
    assert ran.code == 4 and "block_0_prefill.onnx" in ran.error(), ran.err
    damaged = Path(shutil.copytree(coded, tmp_path / "damaged"))
    graph = onnx.load(damaged / "onnx/block_0_decode.onnx", load_external_data=False)
    graph.graph.node.pop()
    onnx.save(graph, damaged / "onnx/block_0_decode.onnx")
    assert tmc("verify", damaged).code != 0


def test_a_reference_that_keeps_its_rows_as_they_are_differs(coded: Path, folder: Path) -> None:
    """The negative twin of the rounding, in every phase of every block."""
    program = open_manifest(coded).program
    assert not failures(coded, program, answered(folder / "coded.yaml", folder / "model", program.kv))
    failed = failures(coded, program, answered(folder / "coded.yaml", folder / "model", None))
    named = {name.split(":")[0].split("/")[1] for name in failed if "SQNR" in name}
    assert named >= {f"block {b} {p}" for b in (0, 1) for p in ("prefill", "chunk", "decode")}, failed


class Off:
    """A backend of whose new rows one head's are some codes away from zero."""

    def __init__(self, backend: Backend, steps: int) -> None:
        self.backend, self.steps = backend, steps

    def graph(self, file: str) -> Any:
        graph: Graph = self.backend.graph(file)

        def run(feed: dict[str, Any]) -> dict[str, np.ndarray]:
            out = graph.run(feed)
            for name in (n for n in out if n.startswith("present.")):
                out[name] = out[name].copy()
                head = out[name][:, 1]
                out[name][:, 1] = np.where((head & 0x7F) + self.steps <= 0x7E, head + self.steps, head)
            return out

        return type("Changed", (), {"run": staticmethod(run)})()


@pytest.mark.parametrize("steps", [1, 2])
def test_rows_some_codes_off_are_found(coded: Path, folder: Path, steps: int) -> None:
    """One code off is allowed of one in two hundred, two are of none."""
    program = open_manifest(coded).program
    cases = answered(folder / "coded.yaml", folder / "model", program.kv)
    failed = failures(coded, program, cases, Off(open_backend("onnxruntime", coded, BackendOptions()), steps))  # type: ignore[arg-type]
    assert len([name for name in failed if f"codes differ, by up to {steps}" in name]) == 2 * 3 * LAYERS, failed


def test_scales_that_clip_what_comes_are_found(folder: Path, scales: Scales) -> None:
    """The negative twin of what codes cost: a reference that rounds to ranges of a twentieth agrees with its bundle alone."""
    small = {name: tuple(s / 20 for s in each) for name, each in scales.items()}
    path = recipe(folder, "clipped", quantize=KV)
    ladder = climb(build_coded(path, folder / "clipped", small, record=True), folder / "model", steps=4)
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
    "bf16": {"quantize": f"{{decoder: {{weights: bf16}}, {KV[1:]}"},
    "long": {"text": RECIPE.replace("text_tokens: 32", "text_tokens: 280").replace("chunk: 8", "chunk: 128")},
}
"""The last one's prompts are cut into blocks of rows, which read slices of what was widened."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ("sums", "weights", "bf16") else n for n in COMBINATIONS])
def test_what_reads_or_prunes_slots_agrees_with_the_reference(name: str, folder: Path, scales: Scales) -> None:
    path = recipe(folder, name, **{"quantize": KV, **COMBINATIONS[name]})
    bundle = build_coded(path, folder / name, scales, record=True)
    assert name != "long" or operators(bundle, "onnx/block_0_prefill.onnx").count("Softmax") > 1
    ladder = climb(bundle, folder / "model", steps=4)
    assert ladder.passed, ladder.text()


@pytest.mark.parametrize(
    ("decoder", "options"),
    [("mistral", {"window": 12}), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("qwen3", {}), ("llama", {"kv_heads": 4})))],
)
def test_decoders_of_other_kinds(decoder: Any, options: dict[str, Any], tmp_path: Path) -> None:
    save_small_llava(tmp_path / "model", decoder, layers=2, vision_layers=2, image_size=42, **options)
    found = peaks(tmp_path / "model", recipe(tmp_path, "peaks", quantize="{}"), "fp8")
    ladder = climb(build_coded(recipe(tmp_path, "coded", quantize=KV), tmp_path / "coded", found, record=True), tmp_path / "model", steps=4)
    assert ladder.passed, ladder.text()


# ----------------------------------------------------------------------------------------------------------------- engines
ENGINE = "target: {device: rtx-5090, runtime: tensorrt-rtx}"


@pytest.fixture(scope="module")
def for_engines(folder: Path, scales: Scales) -> Path:
    path = recipe(folder, "engine", COMBINATIONS["next"]["compress"], quantize=KV, dtype="float16")
    path.write_text(path.read_text("utf-8").replace("target: {device: cpu, runtime: onnxruntime}", ENGINE), "utf-8")
    return build_coded(path, folder / "engine", scales, record=True)  # onnxruntime plays the same graphs


def built(bundle: Path, name: str, capability: str, out: Path) -> Any:
    from tmc_export.engine import EngineOptions, build_engine
    from tmc_export.engine._wire import profiles_from

    (spec,) = (s for s in json.loads((bundle / "engines/profiles.json").read_text())["subgraphs"] if s["name"] == name)
    options = EngineOptions(capabilities=(capability,))
    return build_engine(bundle / spec["onnx"], profiles_from(spec["profiles"]), out, options, precision=spec["precision"])


@pytest.mark.parametrize("capability", ["SM89", "SM120", pytest.param("SM121", marks=pytest.mark.slow)])
def test_tensorrt_rtx_builds_blocks_and_cuts_with_fused_attention(capability: str, for_engines: Path, tmp_path: Path) -> None:
    """Codes with a scale per head, in and out of an engine, of the graphs that onnxruntime runs; executing it: *not run*."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    assert types(for_engines, "engines/block_0.onnx")["past_key_values.0.key"] == FP8
    report = built(for_engines, "block_0", capability, tmp_path / "block.engine")
    assert report.size > 0 and report.capabilities == (capability,) and report.profiles == ("prefill", "chunk", "decode")
    assert sum(layer.attention for layer in report.layers) >= 3, [layer.name for layer in report.layers]
    assert built(for_engines, "compress_1", capability, tmp_path / "cut.engine").size > 0


def test_below_the_capability_that_plan_asks_for_nothing_is_built(for_engines: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    with pytest.raises(ExportError, match="cannot build it"):
        built(for_engines, "block_0", "SM86", tmp_path / "block.engine")


# ----------------------------------------------------------------------------------------------------------------- refused
def test_scales_that_are_missing_are_refused(folder: Path) -> None:
    said = "quantize.kv.weights: fp8 slots need scales that are found on the calibration data.*remove quantize.kv"
    with pytest.raises(LegalityError, match=said):
        build_coded(recipe(folder, "odd", quantize=KV), folder / "odd", None)
    assert not (folder / "odd").exists()


def test_slots_take_no_rows_of_another_type(coded: Path) -> None:
    session = load(coded, threads=1)
    slots, shape = session.decoder.slots[0], (1, session.program.kv_heads, 1, session.program.head_dim)
    rows = np.ones(shape, np.float32)
    with pytest.raises(BundleError, match="new rows of float32 do not fit slots of uint8"):
        slots.write({"present.0.key": rows, "present.0.value": rows}, np.array([0]))
    graph, wide = session._backend.graph("onnx/block_0_chunk.onnx"), np.zeros((*shape[:2], slots.block.capacity, shape[3]), np.int8)
    feed = {name: np.zeros(1) for name in graph.inputs}
    with pytest.raises(BundleError, match=r"past_key_values\.0\.key takes fp8 codes as bytes \(uint8\), not int8"):
        graph.run({**feed, "past_key_values.0.key": wide, "past_key_values.0.value": wide})


def test_a_plan_counts_a_byte_a_number(folder: Path) -> None:
    plain, coded = (plan_of(recipe(folder, n, quantize=q), folder / "model") for n, q in (("plain", "{}"), ("bytes", KV)))
    eight = replace(coded, quantize={"kv": replace(coded.quantize["kv"], weights="int8")})
    mine, theirs = run_memory(coded, "onnxruntime"), run_memory(eight, "onnxruntime")
    assert 4 * mine.kv == run_memory(plain, "onnxruntime").kv and mine.kv == theirs.kv
    assert mine.activations > theirs.activations  # onnxruntime widens the slots before it puts new rows behind them
    assert run_memory(coded, "tensorrt-rtx").activations == run_memory(eight, "tensorrt-rtx").activations
