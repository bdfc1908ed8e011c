"""Checkpoints that are quantized already, from plan to answer: their codes lie in the graphs, and answers are those of the twin's weights.

The twin is a folder of plain weights, `(code - zero point) * scale`, made by `tests/_packed.py`; Hugging Face loads it as any other.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests._packed import FORMS, Packed, group_of, save_packed
from tests._tiny import tmc
from tests.end_to_end._generate import compare_with_generate
from tests.quantize._reading import fused, graphs, parts_of
from tmc_export.core.errors import ExportError, LegalityError, ModelError, ParityError
from tmc_export.runtime.session import load

RECIPE = """\
recipe: 1
name: stored
model: {{source: {source}, dtype: {dtype}}}
inputs: {{images: 1, text_tokens: 48, new_tokens: 24, chunk: 8}}
compress: [{compress}]
target: {target}
"""
PYRAMID = "{at: decoder.1, method: pyramiddrop, layers: [1], keep: [50%]}"
"""Its scores are those of the layer after the cut: the compress graph reads that layer's weights."""
CPU = "{device: cpu, runtime: onnxruntime}"
FULL = ("gptq", "gptq-v2-zero-points", "awq", "packed-zero-points", "packed-8-bits", "fp8")
"""Forms that are built with a cut and the reference recorded; the others are built uncompressed, and compared with `generate` alone."""
OTHERS = tuple(name for name in FORMS if name not in FULL)
FORMS_AS = {"gptq": "int4", "gptq-act-order": "int4", "gptq-8-bits": "int8", "packed-8-bits": "int8", "fp8": "fp8"}


@pytest.fixture(scope="session")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Packed]:
    done: dict[str, Packed] = {}

    def make(name: str) -> Packed:
        if name not in done:
            keep = ("layers.1.mlp.down",) if name == "awq" else ()
            done[name] = save_packed(model, tmp_path_factory.mktemp("stored"), FORMS[name], keep)
            config = done[name].folder / "config.json"
            if name == "awq":  # as its config.json says
                config.write_text(config.read_text().replace('["visual"]', '["visual", "model.layers.1.mlp.down_proj"]'))
        return done[name]

    return make


def build(source: Path, name: str, *, compress: str = PYRAMID, dtype: str = "float32", target: str = CPU, record: bool = False) -> Path:
    from tmc_export.api.bundling import build_bundle

    recipe = source.parent / f"{name}.yaml"
    recipe.write_text(RECIPE.format(source=f"./{source.name}", dtype=dtype, compress=compress, target=target), "utf-8")
    return build_bundle(recipe, source.parent / name, record=record, engines=False).folder


@pytest.fixture(scope="session")
def built(made: Callable[[str], Packed]) -> Callable[[str], Path]:
    """The bundle of a form, made once: with pyramiddrop and its reference recorded where it is one of `FULL`."""
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            full = name in FULL
            done[name] = build(made(name).folder, "bundle", compress=PYRAMID if full else "", record=full)
        return done[name]

    return make


def stored_in(bundle: Path, block: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Linear's name in the graph → codes, scales and zero points."""
    (model,) = graphs(bundle, f"{block}_decode").values()
    found = {}
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scales, *zeros = (i.const_value.numpy() for i in node.inputs)
        for name, columns in parts_of(node.inputs[0]).items():
            zero = zeros[0][..., columns].astype(np.int16) if zeros else None
            found[name.split(".weight")[0]] = codes[:, columns].astype(np.float32), scales[..., columns], zero
    return found


# --------------------------------------------------------------------------------------------------------------- graphs
@pytest.mark.parametrize("name", FORMS)
def test_the_codes_in_the_graphs_are_the_checkpoints(name: str, made: Callable[[str], Packed], built: Callable[[str], Path]) -> None:
    form, packed, seen = FORMS[name], made(name), 0
    for block in (0, 1) if name in FULL else (0,):
        for linear, (codes, scales, zeros) in stored_in(built(name), f"block_{block}").items():
            place = linear.replace("layers.0.", f"layers.{block}.") if block else linear
            (key,) = (k for k in packed.stored if k.endswith(f"{place}.weight"))
            want, zero, scale = packed.stored[key]
            want = want[np.argsort(group_of(len(want), len(scale), form.scattered), kind="stable")]
            shift = 0 if form.fp8 or not form.symmetric else 2 ** (form.bits - 1)
            assert np.array_equal(codes, want.astype(np.float32) - shift), linear
            rows = scales.reshape(-1, scales.shape[-1])
            assert np.array_equal(rows, np.repeat(scale.float().numpy(), len(rows) // len(scale), axis=0)), linear
            assert (zeros is None) == form.symmetric
            if zeros is not None:
                assert np.array_equal(zeros, np.repeat(zero, len(rows) // len(zero), axis=0)), linear
            seen += 1
    assert seen == 14 - (name == "awq")


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order", "packed-act-order"])
def test_products_share_what_brings_their_input_into_the_groups_order(name: str, built: Callable[[str], Path]) -> None:
    """Activation order: a Gather for query, key and value, one for their output, one for gate and up, one for down; else none."""
    for graph in graphs(built(name), "block").values():
        gathers = [n for n in graph.graph if n.op_type == "Gather" and (n.inputs[1].name or "").endswith(".order")]
        layers = 1 if name in FULL else 2
        assert len(gathers) == (4 * layers if FORMS[name].scattered else 0)
        orders = [g.inputs[1].const_value.numpy() for g in gathers]
        assert all(sorted(o.tolist()) == list(range(len(o))) and not np.array_equal(o, np.arange(len(o))) for o in orders)
        joined = [n for n in graph.graph if n.op_type == "DequantizeLinear" and "+" in (n.inputs[0].name or "")]
        assert len(joined) == layers  # query, key and value are one product still


def test_a_linear_that_is_left_out_stays_as_it_is(made: Callable[[str], Packed], built: Callable[[str], Path]) -> None:
    weights = load_file(made("awq").folder / "model.safetensors")
    (name,) = (n for n in weights if n.endswith("layers.1.mlp.down_proj.weight"))
    for graph in graphs(built("awq"), "block_1").values():
        (kept,) = (v.const_value for n, v in graph.graph.initializers.items() if "down_proj" in n)
        assert kept.dtype == ir.DataType.FLOAT and np.array_equal(kept.numpy(), weights[name].numpy().T)


def test_scores_are_computed_with_plain_weights(made: Callable[[str], Packed], built: Callable[[str], Path]) -> None:
    """A compress graph reads what the codes stand for."""
    plain = load_file(made("gptq").twin / "model.safetensors")
    (graph,) = graphs(built("gptq"), "compress").values()
    assert "DequantizeLinear" not in [n.op_type for n in graph.graph]
    scored = ("layers.1.self_attn.q_proj.weight", "layers.1.self_attn.k_proj.weight")
    read = [v.const_value.numpy() for v in graph.graph.initializers.values() if len(v.const_value.shape) == 2]
    wanted = [t.numpy() for n, t in plain.items() if n.endswith(scored) and "vision" not in n]
    assert len(wanted) == 2 and all(any(np.array_equal(r, w.T) for r in read) for w in wanted)


@pytest.mark.parametrize("name", [n for n in FORMS if not n.startswith("fp8")])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_onnxruntime_multiplies_integer_codes_as_they_are(name: str, phase: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    nodes = fused(built(name) / "onnx" / f"block_0_{phase}.onnx", tmp_path / "fused.onnx", 1)
    products = [{a.name: a.i for a in n.attribute} for n in nodes if n.op_type == "MatMulNBits"]
    assert [p["bits"] for p in products] == [FORMS[name].bits] * (5 if name in FULL else 10) and not any(
        n.op_type == "DequantizeLinear" for n in nodes
    )


def test_bytes_are_those_of_the_plan(built: Callable[[str], Path]) -> None:
    """What the plan reckons of a block's layers is what its file holds, biases and padding apart."""
    for name in ("gptq", "gptq-v2-zero-points", "packed-8-bits"):
        bundle = built(name)
        plan = json.loads((bundle / "report" / "plan.json").read_text())
        reckoned = plan["estimate"]["weights"]["decoder"] / 2  # two layers alike
        (graph,) = graphs(bundle, "block_0_decode").values()
        held = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value.dtype != ir.DataType.INT64)
        assert reckoned <= held <= reckoned + 3000, name  # biases of query, key and value, masks and rotary tables


# -------------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("name", FULL)
def test_the_bundle_answers_as_the_reference_within_float32s_tolerance(name: str, built: Callable[[str], Path]) -> None:
    """Nothing was rounded when it was built, so that it is judged as an unquantized bundle is."""
    from tmc_export.bundle.read import open_manifest
    from tmc_export.verify.ladder import precision_of_manifest

    manifest = open_manifest(built(name))
    assert precision_of_manifest(manifest) == "float32"
    assert manifest.proofs["onnxruntime end to end"].startswith("passed; ")
    assert "own" in manifest.proofs["quantized"] and "round nothing" in manifest.proofs["quantized"]


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_the_whole_ladder(name: str, made: Callable[[str], Packed], built: Callable[[str], Path]) -> None:
    ran = tmc("verify", built(name), "--model", made(name).folder)
    assert ran.code == 0, ran.err


def test_qwen2_vl_in_the_hubs_first_layout(tmp_path: Path) -> None:
    """Keys as in Qwen's own AWQ folders: `model.layers.0.mlp.down_proj.qweight`, the decoder's numbers at the top of config.json."""
    from tests.families._small import save_small_qwen2_vl

    model = save_small_qwen2_vl(tmp_path / "model", layers=1, vision_layers=1, flat=True)
    packed = save_packed(model, tmp_path / "made", FORMS["awq"])
    bundle = build(packed.folder, "bundle", compress="", record=True)
    ran = tmc("verify", bundle, "--model", packed.folder)
    assert ran.code == 0, ran.err
    assert len(stored_in(bundle, "block_0")) == 7


@pytest.mark.parametrize(
    "name", ["gptq", "awq", *OTHERS, *(pytest.param(n, marks=pytest.mark.slow) for n in FULL if n not in ("gptq", "awq"))]
)
def test_token_for_token_with_hugging_face_on_the_twin(name: str, made: Callable[[str], Packed], built: Callable[[str], Path]) -> None:
    """Uncompressed, against `generate` of transformers on the plain twin: logits at every step, and the answer."""
    from PIL import Image

    packed = made(name)
    bundle = build(packed.folder, "whole", compress="") if name in FULL else built(name)
    noise = np.random.default_rng(0).integers(0, 255, (2, 42, 42, 3), np.uint8)
    asked = [(Image.fromarray(picture), text) for picture, text in zip(noise, ("what is it", "and where"), strict=True)]
    checks = list(compare_with_generate(load(bundle, threads=1, int4_accuracy=1), packed.twin, asked, 12))
    assert len(checks) == 6 and all(c.passed for c in checks), [f"{c.name}: {c.note}" for c in checks if not c.passed]


def test_one_wrong_code_is_seen(made: Callable[[str], Packed], tmp_path: Path) -> None:
    """The twin of the checks above: codes or groups in another order, and zero points one off, give other answers."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (42, 42, 3), np.uint8)
    for number, (name, part) in enumerate((("awq", "qweight"), ("awq", "qzeros"), ("gptq-act-order", "g_idx"))):
        packed = made(name)
        folder = tmp_path / str(number) / "model"
        shutil.copytree(packed.folder, folder)
        tensors = load_file(folder / "model.safetensors")
        key = next(k for k in tensors if k.endswith(f"layers.0.mlp.up_proj.{part}"))
        tensors[key] = tensors[key] ^ 0x1111_1111 if part == "qzeros" else tensors[key].flip(-1)
        save_file(tensors, folder / "model.safetensors")
        session = load(build(folder, "whole", compress=""), threads=1, int4_accuracy=1)
        checks = list(compare_with_generate(session, packed.twin, [(Image.fromarray(noise), "what is it")], 4))
        assert any(not c.passed and c.name.endswith("logits") for c in checks)


def test_recorded_answers_of_another_model_fail(made: Callable[[str], Packed], built: Callable[[str], Path], tmp_path: Path) -> None:
    """A bundle whose codes are changed after the fact no longer gives what the reference recorded."""
    from tmc_export.bundle.manifest import Manifest
    from tmc_export.bundle.write import seal
    from tmc_export.verify.ladder import recorded_ladder

    bundle = tmp_path / "bundle"
    shutil.copytree(built("gptq"), bundle)
    recorded_ladder(bundle).raise_if_failed()
    data = bundle / "onnx" / "block_0.data"
    held = bytearray(data.read_bytes())
    held[: len(held) // 4] = bytes(len(held) // 4)
    data.write_bytes(held)
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_text())
    seal(bundle, manifest.model_copy(update={"files": {}}))
    with pytest.raises(ParityError):
        recorded_ladder(bundle).raise_if_failed()


def test_a_float16_bundle(made: Callable[[str], Packed]) -> None:
    for name in ("gptq", "awq"):
        bundle = build(made(name).folder, "half", dtype="float16", record=True)
        for codes, scales, _ in stored_in(bundle, "block_0").values():
            assert scales.dtype == np.float16 and codes.shape[0] == scales.shape[0] * 32
        answer = load(bundle, threads=1).generate([np.zeros((42, 42, 3), np.uint8)], "what is it", max_new_tokens=3)
        assert answer.tokens


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", ["gptq", "awq", "packed"])
def test_no_package_of_its_maker_is_needed(name: str, made: Callable[[str], Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageTextToText

    from tmc_export.verify._towers import load_model

    for package in ("auto_gptq", "gptqmodel", "awq", "compressed_tensors", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None)  # whoever imports it fails
    folder = made(name).folder
    weight = load_model(folder, torch.float32).text.layers[0].mlp.up_proj.weight
    assert weight.shape == (128, 64) and bool(weight.any())
    with pytest.raises((ImportError, RuntimeError)):  # its own way does need one
        AutoModelForImageTextToText.from_pretrained(folder)


def test_the_command_refuses_a_second_quantization_and_writes_nothing(made: Callable[[str], Packed]) -> None:
    place = made("gptq").folder.parent
    recipe = place / "again.yaml"
    text = RECIPE.format(source="./packed", dtype="float32", compress="", target=CPU)
    recipe.write_text(text + "quantize: {decoder: {weights: int4, block: 32}}\n")
    for command in (("plan", recipe), ("build", recipe, "-o", place / "again", "-q")):
        ran = tmc(*command)
        assert ran.code == 3 and "already quantized (int4, gptq)" in ran.error() and "remove it" in ran.error()
    assert not (place / "again").exists()


def test_weights_that_are_not_what_config_json_says_are_refused(made: Callable[[str], Packed], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made("awq").folder, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model.layers.1.mlp.down_proj"', '"model.layers.0.mlp.down_proj"'))
    with pytest.raises(ModelError, match=r"'layers.0.mlp.down_proj' is stored in another way than config.json says \(2 such linears\)"):
        build(folder, "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_quantized_vision_tower_is_refused(made: Callable[[str], Packed], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made("gptq").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    key = next(k for k in tensors if "vision_tower" in k and k.endswith("layers.0.mlp.fc2.weight"))
    codes, zeros, scales = FORMS["gptq"].quantize(tensors.pop(key).numpy())
    packed = FORMS["gptq"].pack(codes, zeros, scales)
    tensors |= {f"{key.removesuffix('weight')}{part}": torch.as_tensor(value).contiguous() for part, value in packed.items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"stores '.*vision_tower.*fc2.weight' as codes \(1 such matrices\)"):
        build(folder, "bundle")


def test_zero_points_are_refused_for_tensorrt(made: Callable[[str], Packed]) -> None:
    with pytest.raises(LegalityError, match="TensorRT takes no zero points"):
        build(made("awq").folder, "rtx", dtype="float16", target="{device: rtx-4090, runtime: tensorrt-rtx}")


@pytest.mark.parametrize(
    "name",
    [
        "gptq",
        pytest.param("gptq-act-order", marks=pytest.mark.slow),
        "gptq-8-bits",
        pytest.param("packed-8-bits", marks=pytest.mark.slow),
        "fp8",
    ],
)
def test_tensorrt_rtx_builds_symmetric_codes(name: str, made: Callable[[str], Packed], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    from tmc_export.engine import EngineOptions, build_engine
    from tmc_export.engine._wire import profiles_from

    bundle = build(made(name).folder, "rtx", dtype="float16", target="{device: rtx-4090, runtime: tensorrt-rtx}")
    (spec,) = (s for s in json.loads((bundle / "engines/profiles.json").read_text())["subgraphs"] if s["name"] == "block_0")
    assert spec["precision"] == FORMS_AS[name]
    report = build_engine(
        bundle / spec["onnx"], profiles_from(spec["profiles"]), tmp_path / "b.engine", EngineOptions(capabilities=("SM89",)),
        precision=spec["precision"],
    )  # fmt: skip
    sees = {"int4": "Int4", "int8": "Int8", "fp8": "FP8"}[FORMS_AS[name]]
    readers = [layer for layer in report.layers if sees in layer.constants]
    assert report.size > 0 and len(readers) >= 3 * (3 if name == "gptq-8-bits" else 4)
    products = [layer for layer in readers if layer.kind in ("runtime_fusion", "gemm")]
    assert bool(products) == (name != "gptq-8-bits"), [(layer.kind, layer.name) for layer in readers]  # int8 in groups is widened before


@pytest.mark.parametrize("name", ["awq", pytest.param("packed-zero-points", marks=pytest.mark.slow)])
def test_tensorrt_rtx_refuses_zero_points(name: str, made: Callable[[str], Packed], tmp_path: Path) -> None:
    """Why `plan` does: its parser takes no unsigned codes."""
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    from tmc_export.engine import EngineOptions, build_engine
    from tmc_export.engine._wire import profiles_from

    bundle = build(made(name).folder, "half", dtype="float16", record=True)  # the one of the test above, where that ran
    (spec,) = (s for s in json.loads((bundle / "engines/profiles.json").read_text())["subgraphs"] if s["name"] == "block_0")
    with pytest.raises(ExportError, match="the TensorRT parser refuses"):
        build_engine(
            bundle / spec["onnx"], profiles_from(spec["profiles"]), tmp_path / "b.engine", EngineOptions(capabilities=("SM89",)),
            precision=spec["precision"],
        )  # fmt: skip
