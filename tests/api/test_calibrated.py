"""Schemes that are found on data, from recipe to bundle: against Hugging Face's model with its linears rounded by what is written here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tests.api._four_bits import with_standard_operators  # noqa: E402
from tests.api._theirs import asked, asked_of, key, logits, sqnr, theirs, theirs_in_four  # noqa: E402
from tests.families._small import save_small_llava  # noqa: E402
from tmc_export.api import calibrate as module  # noqa: E402
from tmc_export.api.bundling import build_bundle  # noqa: E402
from tmc_export.api.calibrate import calibrate  # noqa: E402
from tmc_export.api.eager_program import eager_program  # noqa: E402
from tmc_export.api.eager_session import eager_session  # noqa: E402
from tmc_export.api.simulation import SLOTS, Simulation  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.core.errors import RecipeError  # noqa: E402
from tmc_export.plan.make import make_plan  # noqa: E402
from tmc_export.plan.source import read_model_files  # noqa: E402
from tmc_export.quantize.calibrated import Calibrated  # noqa: E402
from tmc_export.quantize.gptq import gptq_blocks  # noqa: E402
from tmc_export.quantize.int4 import dequantize_blocks, quantize_blocks  # noqa: E402
from tmc_export.recipe import load_recipe  # noqa: E402
from tmc_export.runtime._backend import open_backend, options_for  # noqa: E402
from tmc_export.runtime.session import Session  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")  # one model in many schemes

RECIPE = """recipe: 1
name: calibrated
model: {{source: ./model, dtype: {dtype}}}
inputs: {{images: 1, text_tokens: 32, new_tokens: 8, chunk: 8}}
compress: [{entries}]
quantize: {{{parts}, calibration: {{images: pictures, prompts: prompts.jsonl{more}}}}}
target: {target}
"""
CPU = "{device: cpu, runtime: onnxruntime}"
EIGHT = "weights: int8, activations: int8"
W8A8 = f"encoder: {{{EIGHT}}}, projector: {{{EIGHT}}}, decoder: {{{EIGHT}"
KEPT = "layers.1.mlp.down_proj"
_FOUR = "{weights: nvfp4, activations: nvfp4"
FOUR = f"encoder: {_FOUR}}}, projector: {_FOUR}}}, decoder: {_FOUR}, keep: [{KEPT}]}}"
DESKTOP = "{device: rtx-5090, runtime: tensorrt-rtx}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("calibrated")
    save_small_llava(folder / "model", "llama", layers=2, vision_layers=2, hidden=64, image_size=42)
    (folder / "pictures").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (42, 42, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    lines = [{"prompt": text} for text in ("what is it", "the one on the left", "a thing of the other", "in it")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder


def written(home: Path, name: str, parts: str, entries: str = "", dtype: str = "float32", more: str = "", target: str = CPU) -> Path:
    path = home / f"{name}.yaml"
    path.write_text(RECIPE.format(parts=parts, entries=entries, dtype=dtype, more=more, target=target), "utf-8")
    return path


@dataclass(frozen=True)
class Built:
    folder: Path
    found: Calibrated


@pytest.fixture(scope="module")
def build(home: Path) -> Callable[..., Built]:
    """`build(name, parts)` → the bundle, and what its calibration found."""
    made: dict[str, Built] = {}

    def make(name: str, parts: str, **other: Any) -> Built:
        if name not in made:
            found: list[Calibrated] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "calibrate", lambda *given: (found.append(calibrate(*given)), found[0])[1])
                path = written(home, name, parts, **other)
                made[name] = Built(build_bundle(path, home / name, record=False, engines=False).folder, found[0])
        return made[name]

    return make


@pytest.fixture(scope="module")
def exact(home: Path) -> Path:
    path = home / "exact.yaml"
    text = RECIPE.format(parts="X", entries="", dtype="float32", more="", target=CPU)
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("quantize")) + "\n", "utf-8")
    return build_bundle(path, home / "exact", record=False, engines=False).folder


@pytest.mark.parametrize("smooth", ["", ", smooth: 0.5"])
def test_w8a8_is_hugging_face_s_model_with_rounded_linears(smooth: str, home: Path, build: Callable[..., Built], exact: Path) -> None:
    bundle = build("smooth" if smooth else "plain", W8A8 + smooth + f", keep: [{KEPT}]}}")
    calibrated = bundle.found
    assert not any(KEPT in n for n in calibrated.clips) and bool(calibrated.divisors) == bool(smooth)
    session, prompt, got = asked_of(home, bundle.folder)
    want, plain = theirs(home, session, prompt, calibrated), asked_of(home, exact)[2]
    assert sqnr(got, want) > 20 + sqnr(got, plain), (sqnr(got, want), sqnr(got, plain))
    assert sqnr(got, theirs(home, session, prompt, calibrated, factor=1.3)) < sqnr(got, want) - 15  # the negative twin


def test_fp8_too(home: Path, build: Callable[..., Built], exact: Path) -> None:
    """With encoder and projector: what the projector reads is sliced, and onnxruntime slices no fp8 codes."""
    bundle = build("fp8", W8A8.replace("int8", "fp8") + "}")
    session, prompt, got = asked_of(home, bundle.folder)
    want, plain = theirs(home, session, prompt, bundle.found, scheme="fp8"), asked_of(home, exact)[2]
    assert sqnr(got, want) > 20 + sqnr(got, plain), (sqnr(got, want), sqnr(got, plain))
    assert sqnr(got, theirs(home, session, prompt, bundle.found, factor=1.3, scheme="fp8")) < sqnr(got, want) - 15


def test_products_are_joined_and_onnxruntime_multiplies_codes(build: Callable[..., Built], tmp_path: Path) -> None:
    from tests.quantize._reading import fused

    bundle = build("plain", W8A8 + f", keep: [{KEPT}]}}").folder
    for phase in ("prefill", "chunk", "decode"):
        nodes = [n.op_type for n in fused(bundle / "onnx" / f"block_0_{phase}.onnx", tmp_path / f"{phase}.onnx", 1)]
        assert nodes.count("MatMulIntegerToFloat") == 5 + 4  # two layers: query with key and value, o, gate, up, down; one is kept
    symbolic = ir.load(bundle / "engines" / "block_0.onnx")
    points = [n.inputs[2].const_value for n in symbolic.graph if n.op_type == "QuantizeLinear"]
    assert points and all(t.dtype == ir.DataType.INT8 and not t.numpy().any() for t in points)  # TensorRT takes no other zero


def test_nvfp4_w4a4_is_hugging_face_s_model_with_rounded_linears(home: Path, build: Callable[..., Built], exact: Path) -> None:
    """TensorRT's operator runs on no CPU: what NVIDIA's documents say of it stands in its place, and runs on onnxruntime."""
    bundle = build("four", FOUR, target=DESKTOP)
    assert not any(KEPT in n for n in bundle.found.clips)
    folder = bundle.folder.with_name("four_standard")
    shutil.copytree(bundle.folder, folder)
    rounded = {p.stem: with_standard_operators(p, folder / "onnx" / p.name) for p in (bundle.folder / "onnx").glob("*.onnx")}
    # of two layers: query with key and value, output, gate with up, down, which one layer keeps; of two encoder layers and the projector
    assert rounded["block_0_prefill"] == rounded["block_0_chunk"] == rounded["block_0_decode"] == 2 * 4 - 1, rounded
    assert rounded["vision_0"] == len({c for n, c in bundle.found.clips.items() if ".layers." not in n or "vision" in n}), rounded
    manifest = open_manifest(bundle.folder)
    options = options_for(manifest.program, 1)
    session = Session(folder, manifest, open_backend("onnxruntime", folder, options), options)
    _, prompt, got = asked(home, session)
    want, plain = theirs_in_four(home, prompt, bundle.found), asked_of(home, exact)[2]
    assert sqnr(got, want) > 15 + sqnr(got, plain) > 15, (sqnr(got, want), sqnr(got, plain))
    assert sqnr(got, theirs_in_four(home, prompt, bundle.found, factor=1.3)) < sqnr(got, want) - 10  # the negative twin


def test_awq_s_weights_are_those_of_its_equation(home: Path, build: Callable[..., Built]) -> None:
    bundle = build("awq", "decoder: {weights: int4, block: 32, algorithm: awq}")
    calibrated = bundle.found
    assert calibrated.divisors and not calibrated.clips
    session, prompt, got = asked_of(home, bundle.folder, int4_accuracy=1)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(home / "model", dtype=torch.float32).eval()
    plain = logits(model, prompt)
    parts = {key(f"{name}.weight"): part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    exact = {name: part.weight.data for name, part in parts.items()}

    def store(chosen: Callable[[str, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        for name, divisor in calibrated.divisors.items():
            codes, scales = chosen(name, np.ascontiguousarray(exact[key(name)].numpy().T) * divisor[:, None])
            parts[key(name)].weight.data = torch.from_numpy((dequantize_blocks(codes, scales) / divisor[:, None]).T.copy())
        return logits(model, prompt)

    def steps(name: str, weight: np.ndarray) -> np.ndarray:
        """How many steps of its block's scale each weight lies from its code; those at the end of the range may lie farther."""
        codes, scales = calibrated.codes[name]
        away: np.ndarray = np.abs(weight / np.repeat(scales, 32, axis=0) - codes) * ((codes > -8) & (codes < 7))
        return away

    assert calibrated.codes.keys() == calibrated.divisors.keys() and len(calibrated.codes) == 14
    for name, divisor in calibrated.divisors.items():
        assert steps(name, exact[key(name)].numpy().T * divisor[:, None]).max() < 0.501
        assert steps(name, exact[key(name)].numpy().T * np.roll(divisor, 1)[:, None] * 1.2).max() > 0.501
    assert sqnr(got, store(lambda name, _: calibrated.codes[name])) > 80 > 40 > sqnr(got, plain)
    assert sqnr(got, store(lambda _, weight: quantize_blocks(weight, 32))) < 50  # the negative twin: rounded without the data


def test_gptq_s_codes_are_those_of_its_algorithm(home: Path, build: Callable[..., Built], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of products seen by hooks in Hugging Face's model, on the prompts that calibration saw; two passes over the samples."""
    asked: list[Any] = []
    right = Session.run_prompt
    monkeypatch.setattr(Session, "run_prompt", lambda self, prompt, route="auto": (asked.append(prompt), right(self, prompt, route))[1])
    monkeypatch.setattr(module, "_PRODUCTS", 4 * 64 * 64 * 5)
    bundle = build("gptq", "decoder: {weights: int4, block: 32, algorithm: gptq}")
    prompts = asked[: len(asked) // (len(asked) // 4)]  # four samples, as often as there were passes
    assert len(prompts) == 4 and len(asked) >= 3 * 4
    model = transformers.LlavaForConditionalGeneration.from_pretrained(home / "model", dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    parts = {key(f"{n}.weight"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    def add(name: str, rows: torch.Tensor) -> None:
        flat = rows.reshape(-1, rows.shape[-1])
        sums[name] = sums.get(name, torch.zeros(flat.shape[1], flat.shape[1])) + flat.T @ flat

    hooks = [m.register_forward_pre_hook(lambda _, given, n=n: add(n, given[0])) for n, m in parts.items()]
    for prompt in prompts:
        logits(model, prompt)
    for hook in hooks:
        hook.remove()
    assert len(bundle.found.codes) == 14
    for name, (codes, scales) in bundle.found.codes.items():
        part = parts[key(name)]
        weight = np.ascontiguousarray(part.weight.data.numpy().T)
        wanted = gptq_blocks(weight, sums[key(name)].numpy(), 32)
        assert (codes != wanted[0]).mean() < 0.01 < (codes != quantize_blocks(weight, 32)[0]).mean(), name
        part.weight.data = torch.from_numpy(dequantize_blocks(codes, scales).T.copy())
    _, prompt, got = asked_of(home, bundle.folder, int4_accuracy=1)
    assert sqnr(got, logits(model, prompt)) > 80


def test_slots_get_the_scales_that_were_seen(build: Callable[..., Built], exact: Path, home: Path) -> None:
    bundle = build("slots", "kv: {weights: int8}")
    program = open_manifest(bundle.folder).program
    assert program.kv is not None and program.kv.scales.keys() == {f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")}
    for name, scales in program.kv.scales.items():
        assert scales == pytest.approx(bundle.found.slots[name], rel=1e-6) and len(scales) == 2
    got, plain = (asked_of(home, folder)[2] for folder in (bundle.folder, exact))
    assert 20 < sqnr(got, plain) < 90  # codes are read, and cost what 8 bits cost


def test_the_selection_is_in_the_loop(build: Callable[..., Built]) -> None:
    """Behind a cut the ranges are those of the rows that are left: they change with the cut, and the rows before it do not."""
    parts = f"decoder: {{{EIGHT}}}"
    whole, cut = build("whole", parts).found, build("cut", parts, entries="{at: decoder.1, method: fastv, keep: 2}").found
    before = [n for n in whole.clips if "layers.0." in n]
    behind = [n for n in whole.clips if "layers.1." in n]
    assert len(before) == len(behind) == 7 and all(whole.clips[n] == pytest.approx(cut.clips[n], rel=1e-5) for n in before)
    assert any(whole.clips[n] > 1.01 * cut.clips[n] for n in behind) and all(whole.clips[n] > 0.999 * cut.clips[n] for n in behind)


def test_the_manifest_says_what_data_it_was_and_other_data_is_another_bundle(home: Path) -> None:
    parts = f"decoder: {{{EIGHT}}}"
    path = written(home, "data", parts, more=", samples: 2")
    first = build_bundle(path, home / "data", record=False, engines=False)
    assert first.manifest.calibration == {"samples": 2, "sha256": first.manifest.calibration["sha256"]}
    assert open_manifest(home / "data").calibration == first.manifest.calibration
    assert build_bundle(path, home / "data", record=False, engines=False).cached
    prompts = (home / "prompts.jsonl").read_text("utf-8")
    try:
        (home / "prompts.jsonl").write_text(prompts.replace("what is it", "what is there"), "utf-8")
        again = build_bundle(path, home / "data", record=False, engines=False)
    finally:
        (home / "prompts.jsonl").write_text(prompts, "utf-8")
    assert not again.cached and again.manifest.calibration != first.manifest.calibration


def test_a_linear_that_no_sample_reaches_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(home, "unreached", f"decoder: {{{EIGHT}}}")
    monkeypatch.setattr("tmc_export.api.calibrate._clips", lambda *_: {})
    with pytest.raises(RecipeError, match=r"no sample reached '.*layers\.0.*'.* give samples"):
        build_bundle(path, home / "unreached", record=False, engines=False)
    assert not (home / "unreached").exists()


def test_data_that_is_not_there_stops_the_build_before_anything_is_made(home: Path) -> None:
    path = written(home, "nowhere", f"decoder: {{{EIGHT}}}")
    path.write_text(path.read_text("utf-8").replace("prompts.jsonl", "gone.jsonl"), "utf-8")
    with pytest.raises(RecipeError, match=r"quantize\.calibration\.prompts: cannot read .*gone\.jsonl"):
        build_bundle(path, home / "nowhere", record=False, engines=False)
    assert not (home / "nowhere").exists()


# ------------------------------------------------------------------------------------------------ the same schemes, simulated
@dataclass(frozen=True)
class Traced:
    """A recipe's subgraphs in PyTorch."""

    home: Path
    plan: Any
    eager: Any

    def logits(self, quantize: Any, found: Calibrated, prompt: Any, less: int = 0) -> np.ndarray:
        """First logits with a plan's schemes acted out, but for the last `less` weights; of nothing rounded without schemes."""
        plan = replace(self.plan, quantize=quantize)
        simulation = Simulation(plan, self.eager, found)
        names = [*simulation.targets, *([SLOTS] if simulation.slots else [])]
        with eager_session(plan, self.eager, self.home / "model", {}, simulation.backend) as session, simulation.rounding(names[less:]):
            return session.run_prompt(session.prompt(prompt[0], session.encode_images(prompt[1]))).logits.reshape(-1)


def traced(path: Path) -> Traced:
    recipe, files = load_recipe(path), read_model_files(path.parent / "model")
    plan, _ = make_plan(recipe, files)
    config = transformers.AutoConfig.from_pretrained(path.parent / "model")
    return Traced(path.parent, plan, eager_program(plan, files, path.parent / "model", config, None, reads=True))


@pytest.fixture(scope="module")
def whole(home: Path) -> Traced:
    return traced(written(home, "whole-model", f"decoder: {{{EIGHT}}}"))


def scheme_of(home: Path, name: str) -> Any:
    return make_plan(load_recipe(home / f"{name}.yaml"), read_model_files(home / "model"))[0].quantize


def test_a_simulation_gives_the_bundle_s_logits(home: Path, build: Callable[..., Built], whole: Traced) -> None:
    """As near to onnxruntime's as its kernels are to the codes; with one weight left out, farther by far."""
    rows = {
        "smooth": (W8A8 + f", smooth: 0.5, keep: [{KEPT}]}}", 40.0),  # a code that lies half-way may turn, and is seen in all that follows
        "awq": ("decoder: {weights: int4, block: 32, algorithm: awq}", 100.0),
        "gptq": ("decoder: {weights: int4, block: 32, algorithm: gptq}", 100.0),
        "slots": ("kv: {weights: int8}", 60.0),
        "fp8-slots": ("kv: {weights: fp8}", 60.0),
        "fp8": (W8A8.replace("int8", "fp8") + "}", 30.0),
    }
    for name, (parts, least) in rows.items():
        bundle = build(name, parts)
        got = asked_of(home, bundle.folder, int4_accuracy=1)[2]
        prompt = [5, 6, open_manifest(bundle.folder).program.image_token, 7, 9, 11], [str(home / "pictures" / "1.png")]
        plan = scheme_of(home, name)
        mine = whole.logits(plan, bundle.found, prompt)
        assert sqnr(mine, got) > least, name
        assert sqnr(whole.logits(plan, bundle.found, prompt, less=1), got) < sqnr(mine, got) - 5, name  # the negative twin


def test_a_simulation_in_four_bits(home: Path, build: Callable[..., Built], whole: Traced, exact: Path) -> None:
    bundle = build("four", FOUR, target=DESKTOP)
    session, prompt, plain = asked_of(home, exact)
    question = [5, 6, session.program.image_token, 7, 9, 11], [str(home / "pictures" / "1.png")]
    mine = whole.logits(scheme_of(home, "four"), bundle.found, question)
    want = theirs_in_four(home, prompt, bundle.found)
    assert sqnr(mine, want) > 15 + sqnr(mine, plain) > 15, (sqnr(mine, want), sqnr(mine, plain))
    assert sqnr(mine, theirs_in_four(home, prompt, bundle.found, factor=1.3)) < sqnr(mine, want) - 10  # the negative twin
