"""What the tests share of equal subgraphs (`tests/_traced.py`): the graphs that tracing anew gives, and only those of equal modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("torch")

from tests import _traced  # noqa: E402
from tests._tiny import RECIPE, TEXT_ONLY, write_recipe  # noqa: E402
from tests.families._small import save_small_llava, save_small_qwen2_5_vl, save_small_qwen2_vl  # noqa: E402
from tmc_export.api import exporter  # noqa: E402
from tmc_export.api.bundling import build_bundle  # noqa: E402
from tmc_export.api.exporter import Exporter  # noqa: E402
from tmc_export.api.subgraphs import program_of  # noqa: E402
from tmc_export.export.capture import OPSET, capture  # noqa: E402
from tmc_export.passes.pipeline import specialize  # noqa: E402
from tmc_export.plan.make import make_plan  # noqa: E402
from tmc_export.plan.source import read_model_files  # noqa: E402
from tmc_export.recipe import load_recipe  # noqa: E402

ADAFV = "{at: decoder.0, method: adafv, keep: 60%}"
FASTV = "{at: decoder.1, method: fastv, keep: 4}"


def save(folder: Path, seed: int = 0, **options: Any) -> Path:
    save_small_llava(folder / "model", layers=2, vision_layers=2, hidden=32, image_size=42, seed=seed, **options)
    return folder


def build(folder: Path, text: str, out: str) -> dict[str, bytes | str]:
    """Graphs, weights and profiles of a bundle, by file."""
    bundle = build_bundle(write_recipe(folder, text), folder / out, record=False, engines=False).folder
    paths = [p for place in ("onnx", "engines") for p in sorted((bundle / place).iterdir())]
    return {f"{p.parent.name}/{p.name}": told(p) if p.suffix == ".onnx" else p.read_bytes() for p in paths}


def told(graph: Path) -> str:
    """A graph in words. Names that passes made up are numbered in the order of the file: a copy of a graph counts them anew."""
    numbers: dict[str, int] = {}
    text = str(onnx.load(graph, load_external_data=False))
    return re.sub(r'"((?:val|node)_\w+)"', lambda found: f"#{numbers.setdefault(found[1], len(numbers))}", text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(TEXT_ONLY, ["DecoderBlock", "Embed"], id="text"),
        pytest.param(RECIPE, ["Cut", "DecoderBlock", "DecoderBlock", "Embed", "Vision"], id="a picture and a cut", marks=pytest.mark.slow),
    ],
)
def test_a_graph_that_is_taken_again_is_the_one_that_tracing_gives(
    text: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models of one configuration: the second one's bundle has its own weights in the first one's graphs."""
    traced: list[str] = []

    def counted(module: Any, *rest: Any, **more: Any) -> Any:
        traced.append(type(module).__name__)
        return capture(module, *rest, **more)

    monkeypatch.setattr(exporter, "capture", capture)  # where another test's fixture has changed it
    monkeypatch.setattr(_traced, "_KEPT", [])
    monkeypatch.setattr(_traced, "capture", counted)
    one, other = save(tmp_path / "one"), save(tmp_path / "other", seed=1)
    with _traced.traced_once():
        first = build(one, text, "out")
        shared = build(other, text, "shared")
    assert sorted(traced) == parts
    anew = build(other, text, "anew")
    assert shared.keys() == anew.keys() and [name for name in anew if shared[name] != anew[name]] == []
    assert {name for name in first if first[name] != anew[name]} >= {"onnx/block_0.data", "onnx/embed.data"}


INT8, KV_INT8, KV_FP8 = "decoder: {weights: int8}", "kv: {weights: int8}", "kv: {weights: fp8}"


@pytest.mark.parametrize(
    ("text", "schemes"),
    [
        pytest.param(TEXT_ONLY, [KV_INT8], id="text"),
        pytest.param(RECIPE, [INT8, KV_INT8, KV_FP8], id="a picture and a cut", marks=pytest.mark.slow),
    ],
)
def test_a_graph_that_got_its_sizes_before_is_the_one_that_gets_them_anew(
    text: str, schemes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemes of one model, each in the graphs that the others' builds have left alone; slots of codes have their own."""
    from PIL import Image

    monkeypatch.setattr(exporter, "capture", capture)
    monkeypatch.setattr(_traced, "_KEPT", [])
    given: list[str] = []
    monkeypatch.setattr(_traced, "specialize", lambda *rest, **more: given.append(rest[2]) or specialize(*rest, **more))
    folder = save(tmp_path)
    (folder / "seen").mkdir()
    Image.new("RGB", (42, 42), "red").save(folder / "seen" / "1.png")
    (folder / "prompts.jsonl").write_text('{"prompt": "what is it"}\n', "utf-8")
    pictures = "" if text is TEXT_ONLY else f", images: {folder / 'seen'}"
    data = f"calibration: {{prompts: {folder / 'prompts.jsonl'}{pictures}}}"
    texts = [text, *(text.replace("quantize: {}", f"quantize: {{{s}{f', {data}' if 'kv' in s else ''}}}") for s in schemes)]
    with _traced.traced_once(one_checkpoint=True):
        shared = [build(folder, each, f"shared-{n}") for n, each in enumerate([*texts, texts[0]])]
    assert given.count("embed_prefill") == 1 and not _traced._STATIC
    assert given.count("block_0_prefill") == 1 + sum("kv" in s for s in schemes)
    anew = [build(folder, each, f"anew-{n}") for n, each in enumerate(texts)]
    for mine, theirs in zip(shared, [*anew, anew[0]], strict=True):
        assert mine.keys() == theirs.keys() and [name for name in theirs if mine[name] != theirs[name]] == []
    assert len({str(sorted(found.items())) for found in anew}) == len(texts), "every scheme has other graphs"


def keys(folder: Path, text: str = RECIPE, change: Callable[[Any], None] = lambda config: None) -> dict[str, object | None]:
    """What each subgraph's trace hangs on, by bundle file."""
    import transformers

    files = read_model_files(folder / "model")
    plan, _ = make_plan(load_recipe(write_recipe(folder, text)), files)
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    change(config)
    work = Exporter(plan, files, folder / "model", config, folder, None, OPSET, lambda _: None, write=False)
    work.schemes.finish = lambda: None  # type: ignore[method-assign] - it counts the weights of graphs that are written
    program_of(work, {})
    return {
        file: _traced.traced_for(
            r.module, list(r.examples), work.model, input_names=list(r.inputs), symbols=list(r.symbols), opset=OPSET, learned={}
        )
        for file, r in work.runnables.items()
        if not file.endswith(("_chunk.onnx", "_decode.onnx"))
    }  # fmt: skip


@pytest.mark.parametrize("model", [save_small_llava, save_small_qwen2_vl, save_small_qwen2_5_vl], ids=lambda save: save.__name__[11:])
def test_what_only_runs_is_not_traced(model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration looks into modules: their graphs would be thrown away."""
    monkeypatch.setattr(exporter, "capture", lambda *_, **__: pytest.fail("it was traced"))
    model(tmp_path / "model", layers=2)
    entry = ADAFV if model is save_small_llava else FASTV  # a state that one graph hands to another
    assert len(keys(tmp_path, RECIPE.replace(FASTV, entry))) == (4 if entry is ADAFV else 5)


def differing(one: dict[str, object | None], other: dict[str, object | None]) -> set[str]:
    return {file.removeprefix("onnx/").removesuffix(".onnx") for file in one.keys() | other.keys() if one.get(file) != other.get(file)}


EVERY = {"vision_0", "embed_prefill", "block_0_prefill", "block_1_prefill", "compress_1"}


def test_only_equal_modules_have_a_trace_in_common(tmp_path: Path) -> None:
    folder = save(tmp_path)
    mine = keys(folder)
    assert differing(mine, {}) == EVERY
    assert not differing(mine, keys(save(tmp_path / "seed", seed=1)))
    assert not differing(mine, keys(folder, RECIPE.replace("quantize: {}", "quantize: {decoder: {weights: int8}}")))
    assert differing(mine, keys(folder, RECIPE.replace("dtype: float32", "dtype: float16"))) == EVERY
    assert differing(mine, keys(folder, change=lambda config: setattr(config.text_config, "rms_norm_eps", 0.1))) == EVERY
    assert differing(mine, keys(folder, RECIPE.replace("keep: 4", "keep: 3"))) == {"compress_1"}
    assert differing(mine, keys(folder, RECIPE.replace(FASTV, "{at: decoder.1, method: random, keep: 4}"))) == {
        "compress_1",
        "block_0_prefill",
    }
    at_projector = keys(folder, RECIPE.replace(FASTV, "{at: projector, method: random, keep: 4}"))
    assert differing(mine, at_projector) == {"vision_0", "block_0_prefill", "block_1_prefill", "compress_1"}
    assert len([a for n, a in enumerate(mine.values()) if a not in list(mine.values())[:n]]) == len(EVERY)


def test_what_hands_on_states_is_traced_each_time(tmp_path: Path) -> None:
    """Their shapes are found out by tracing."""
    found = keys(save(tmp_path), RECIPE.replace(FASTV, ADAFV))
    assert found["onnx/vision_0.onnx"] is None and found["onnx/compress_0.onnx"] is None
    assert found["onnx/block_0_prefill.onnx"] is not None
