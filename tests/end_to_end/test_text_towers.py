"""Text towers end to end: TRIM and LLaMA-VID with a tiny CLIP on the small LLaVA; other questions, other weights, other tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
AutoConfig = pytest.importorskip("transformers").AutoConfig

from tests._tower import WIDTH, save_clip  # noqa: E402
from tests.end_to_end._tiny import EXAMPLES, MODEL  # noqa: E402
from tmc_export.api import build, load  # noqa: E402
from tmc_export.api.eager_program import eager_program  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.bundle.write import hash_file, seal  # noqa: E402
from tmc_export.core.errors import ModelError, RuntimeInputError  # noqa: E402
from tmc_export.plan.make import make_plan  # noqa: E402
from tmc_export.plan.source import read_model_files  # noqa: E402
from tmc_export.recipe import load_recipe  # noqa: E402
from tmc_export.report.inspect import describe, render  # noqa: E402
from tmc_export.runtime._backend import BackendOptions  # noqa: E402
from tmc_export.runtime._chat import expand_image_tokens  # noqa: E402
from tmc_export.runtime._text_tower import TextTowers, tower_ids  # noqa: E402
from tmc_export.runtime._tokenizer import Tokenizer  # noqa: E402
from tmc_export.runtime.session import Session  # noqa: E402
from tmc_export.verify.ladder import climb, recorded_ladder  # noqa: E402
from tmc_export.verify.play import play  # noqa: E402
from tmc_export.verify.recorded import read_cases  # noqa: E402
from tmc_export.verify.reference import Reference  # noqa: E402
from tmc_export.verify.tolerances import tolerance  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

TRIM = "{at: encoder, method: trim, keep: 25%, tower: TOWER, width: 24, weights: {file: clip/model.safetensors}}"
VID = "{at: projector.replace, method: llama_vid, grid: 4, tower: TOWER, tower_width: 24, weights: {random: 3}}"
PICTURES = [EXAMPLES / "pictures" / f"scene-{n}.png" for n in (1, 2)]
QUESTIONS = ("what is at c4", "How many RED things are there?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("towers")
    save_clip(place / "clip")
    return place


def write(folder: Path, name: str, entry: str, inputs: str = "images: 2", dtype: str = "float32", tower: str = "clip") -> Path:
    lines = ["recipe: 1", f"name: {name}", f"model: {{source: {MODEL}, dtype: {dtype}}}"]
    lines += [f"inputs: {{{inputs}, text_tokens: 64, new_tokens: 16}}", "compress:", f"  - {entry.replace('TOWER', tower)}"]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join([*lines, "target: {device: cpu, runtime: onnxruntime}", ""]), "utf-8")
    return path


@pytest.fixture(scope="module")
def trim(folder: Path) -> Path:
    """A bundle; building it plays the recorded conversations, so that it has parity end to end."""
    return build(write(folder, "trim", TRIM), folder / "trim").folder


# ---------------------------------------------------------------------------------------------------------------- parity
def test_eager_reads_the_tower_as_onnxruntime_does(trim: Path, folder: Path) -> None:
    recipe, files, manifest = load_recipe(folder / "trim.yaml"), read_model_files(MODEL), open_manifest(trim)
    plan, _ = make_plan(recipe, files)
    towers = {t.source: folder / "clip" for t in plan.towers}
    made = eager_program(plan, files, MODEL, AutoConfig.from_pretrained(MODEL), recipe.inputs.fit, towers)
    assert made.program == manifest.program
    eager, other = Session(trim, manifest, made.backend, BackendOptions()), load(trim)
    kept = []
    for question in QUESTIONS:
        one = eager.generate(PICTURES[:1], question, chat=False, max_new_tokens=2)
        two = other.generate(PICTURES[:1], question, chat=False, max_new_tokens=2)
        assert one.tokens == two.tokens
        out = [s.prompt([s.program.image_token], s.encode_images(PICTURES[:1]), [question]).sources[0][0].tolist() for s in (eager, other)]
        assert out[0] == out[1]
        kept.append(out[0])
    assert kept[0] != kept[1], "another question keeps other tokens"


def test_trim_climbs_the_ladder(trim: Path, folder: Path) -> None:
    manifest = open_manifest(trim)
    assert manifest.proofs["onnxruntime end to end"].startswith("passed")
    (tower,) = manifest.program.towers
    assert (tower.file, tower.folder, tower.tokens, tower.width) == ("onnx/text_tower_0.onnx", "towers/0", 16, WIDTH)
    assert manifest.program.vision[0].towers == (0,) and manifest.program.vision[0].tokens == 50  # 49 of 196, and the mean
    assert {"towers/0/tokenizer.json", "towers/0/config.json", "onnx/text_tower_0.data"} <= set(manifest.files)
    assert "text tower onnx/text_tower_0.onnx: a question of 16 tokens -> 24 channels" in render(describe(trim))
    ladder = climb(trim, MODEL, steps=2, recipe_folder=folder)
    assert ladder.passed, ladder.text()
    checked = [c for r in ladder.rungs for c in r.checks if c.subgraph == tower.file]
    assert checked and all(c.metrics is not None for c in checked)


def test_tensorrt_rtx_parses_and_builds_the_tower_and_what_it_feeds(trim: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    import onnx

    from tests.graphs._checks import wrong_engine

    tower, vision = (onnx.load(trim / "onnx" / f"{name}.onnx") for name in ("text_tower_0", "vision_0"))
    assert [v.name for v in tower.graph.input] == ["ids"] and [v.name for v in vision.graph.input] == ["pixels", "text.0"]
    assert wrong_engine(tower) == [] and wrong_engine(vision) == []


@pytest.mark.slow
@pytest.mark.parametrize("entry", [TRIM, VID])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_both_places_in_both_precisions_and_recomputed(entry: str, dtype: str, folder: Path) -> None:
    name = f"{'trim' if entry is TRIM else 'vid'}-{dtype}-recompute"
    bundle = build(write(folder, name, entry, "images: 2, turns: recompute", dtype), folder / name).folder
    ladder = climb(bundle, MODEL, steps=2, recipe_folder=folder)
    assert ladder.passed, ladder.text()


def test_llama_vid_reads_the_tower_at_a_cut(folder: Path) -> None:
    bundle = build(write(folder, "vid", VID), folder / "vid").folder
    program = open_manifest(bundle).program
    assert program.vision[0].towers == () and program.cuts[0].towers == (0,)
    session = load(bundle, threads=1)
    cases = [c for c in read_cases(bundle) if c.name == "pictures"]
    table = tolerance("end_to_end", "float32")
    assert all(c.passed for c in play(session, cases, table, "float32"))
    twisted = _with_texts(cases, lambda text: "red red red")
    assert not all(c.passed for c in play(session, twisted, table, "float32"))  # the context token hangs on the question


@pytest.mark.slow
def test_a_tower_saved_alone_gives_the_same(trim: Path, folder: Path) -> None:
    save_clip(folder / "text", text_only=True)
    torch_free = TextTowers(open_manifest(trim).program.towers, trim, load(trim)._backend)
    plan, _ = make_plan(load_recipe(write(folder, "alone", TRIM, tower="text")), read_model_files(MODEL))
    assert plan.towers[0].width == WIDTH
    bundle = build(folder / "alone.yaml", folder / "alone").folder
    ids = torch_free.ids(0, QUESTIONS[0])
    assert ids.shape == (1, 16)
    assert load(bundle)._towers.ids(0, QUESTIONS[0]).tolist() == ids.tolist()


# ------------------------------------------------------------------------------------------------------------- questions
def test_other_questions_keep_other_tokens_of_the_same_picture(trim: Path) -> None:
    session = load(trim, threads=1)
    pixels = session.encode_images(PICTURES[:1])
    ids = [session.program.image_token, 9]
    kept = [np.sort(session.prompt(ids, pixels, [q]).sources[0][0]) for q in QUESTIONS]
    assert not np.array_equal(*kept)
    again = np.sort(session.prompt(ids, pixels, [QUESTIONS[0]]).sources[0][0])
    assert np.array_equal(again, kept[0])


@pytest.mark.parametrize("turns", ["freeze", pytest.param("recompute", marks=pytest.mark.slow)])
def test_each_turns_pictures_are_read_by_its_own_question(turns: str, trim: Path, folder: Path) -> None:
    """The session, which makes the questions out of prompts, against the reference, which is given them."""
    recipe = write(folder, turns, TRIM, f"images: 2, turns: {turns}")
    bundle = build(recipe, folder / turns, record=False).folder if turns != "freeze" else trim
    plan, _ = make_plan(load_recipe(recipe), read_model_files(MODEL))
    session, reference = load(bundle, threads=1), Reference(MODEL, plan)
    said: list[int] = []
    for number, (picture, question) in enumerate(zip(PICTURES, QUESTIONS, strict=True)):
        pixels = session.encode_images([picture])
        ids, _ = session._conversation.ask(f"<image>\n{question}", pixels, chat=False)
        expanded, group = expand_image_tokens(ids, session.program.image_token, [50])
        want = reference.turn([p[0] for _, p in pixels], expanded, group.astype(np.int64), max_new_tokens=4, until_eos=False, text=question)
        got = session.turn([picture], f"<image>\n{question}", chat=False, max_new_tokens=4)
        said = list(got.tokens)
        assert said == list(want.tokens[: len(said)]), number
        if len(said) < 4:  # an end token: the reference went on, and its conversation is another one
            break
    assert session._conversation.said.questions == QUESTIONS[: number + 1] and number >= 0 and said


def test_a_turn_without_pictures_runs_no_tower(trim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(trim, threads=1)
    monkeypatch.setattr(session._towers, "_run", lambda text: pytest.fail("a tower ran"))
    assert session.generate((), "what is at a1", max_new_tokens=1).tokens


def test_a_picture_without_its_question_is_refused(trim: Path) -> None:
    session = load(trim, threads=1)
    with pytest.raises(RuntimeInputError, match="1 pictures came with 0 questions"):
        session.prompt([session.program.image_token], session.encode_images(PICTURES[:1]))


def test_ids_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    own, theirs = Tokenizer(folder / "clip"), AutoTokenizer.from_pretrained(folder / "clip")
    texts = ("", "what is at c4", "How  MANY red\nthings?", "what " * 40, "<|endoftext|> red", "Bläue: 12!")
    lengths = set()
    for text in texts:
        want: list[int] = theirs(text, padding="max_length", truncation=True, max_length=16)["input_ids"]
        assert tower_ids(own, text, 16) == want, text
        lengths.add(want.index(want[-1]))
    assert len(lengths) >= 4  # padded, full and cut ones


# --------------------------------------------------------------------------------------------------------- negative twins
def _with_texts(cases: list[Any], change: Any) -> list[Any]:
    from dataclasses import replace

    return [replace(c, turns=tuple(replace(t, text=change(t.text)) for t in c.turns)) for c in cases]


def test_another_question_fails_parity(trim: Path) -> None:
    cases, table = list(read_cases(trim)), tolerance("end_to_end", "float32")
    assert all(t.text for c in cases for t in c.turns if t.pixels)
    session = load(trim, threads=1)
    assert all(c.passed for c in play(session, cases, table, "float32"))
    wrong = [c for c in play(session, _with_texts(cases, lambda text: "red red red"), table, "float32") if not c.passed]
    assert any("trim at encoder" in c.name for c in wrong)


def test_exchanged_tower_weights_fail_parity(trim: Path, folder: Path, tmp_path: Path) -> None:
    save_clip(folder / "other", seed=1)
    other = build(write(folder, "other", TRIM, tower="other"), folder / "other-bundle", record=False).folder
    bad = tmp_path / "bad"
    shutil.copytree(trim, bad)
    for name in ("text_tower_0.onnx", "text_tower_0.data"):
        assert hash_file(other / "onnx" / name) != hash_file(bad / "onnx" / name) or name.endswith(".onnx")
        shutil.copyfile(other / "onnx" / name, bad / "onnx" / name)
    seal(bad, open_manifest(bad))
    assert not recorded_ladder(bad).passed
    ladder = climb(bad, MODEL, steps=2, recipe_folder=folder)
    assert ladder.first_bad is not None and ladder.first_bad.subgraph == "onnx/text_tower_0.onnx"


def test_another_towers_files_are_refused(trim: Path, folder: Path, tmp_path: Path) -> None:
    save_clip(tmp_path / "clip", seed=2)
    shutil.copyfile(folder / "clip" / "model.safetensors", tmp_path / "weights")
    with pytest.raises(ModelError, match="learned weights"):  # the projection is of the same file
        climb(trim, MODEL, steps=2, recipe_folder=tmp_path)
    shutil.copyfile(folder / "clip" / "model.safetensors", tmp_path / "clip" / "model.safetensors")
    (tmp_path / "clip" / "tokenizer_config.json").write_text("{}", "utf-8")
    with pytest.raises(ModelError, match="not the file of the text tower that the bundle was made from"):
        climb(trim, MODEL, steps=2, recipe_folder=tmp_path)


@pytest.mark.slow
def test_another_tower_is_another_bundle(folder: Path) -> None:
    save_clip(folder / "moved", seed=0)
    recipe = write(folder, "moved", TRIM, tower="moved")
    assert not build(recipe, folder / "cache", record=False).cached
    assert build(recipe, folder / "cache", record=False).cached
    save_clip(folder / "moved", seed=5)
    assert not build(recipe, folder / "cache", record=False).cached


def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    text = (tmp_path / "clip" / "config.json").read_text("utf-8")
    (tmp_path / "clip" / "config.json").write_text(text.replace('"eos_token_id": ', '"eos_token_id": 3, "was": '), "utf-8")
    with pytest.raises(ModelError, match=r"is read at token 3 of \d+, and its tokenizer writes"):
        build(write(tmp_path, "trim", TRIM), tmp_path / "out")


@pytest.mark.slow
def test_the_old_number_of_the_end_token(folder: Path, tmp_path: Path) -> None:
    """CLIP's first configurations say 2 and mean the highest id."""
    shutil.copytree(folder / "clip", tmp_path / "clip")
    text = (tmp_path / "clip" / "config.json").read_text("utf-8")
    (tmp_path / "clip" / "config.json").write_text(text.replace('"eos_token_id": ', '"eos_token_id": 2, "was": '), "utf-8")
    bundle = build(write(tmp_path, "trim", TRIM, "images: 1"), tmp_path / "out").folder
    assert open_manifest(bundle).proofs["onnxruntime end to end"].startswith("passed")


@pytest.mark.slow
def test_the_shipped_recipe(repository: Path, tmp_path: Path) -> None:
    manifest = build(repository / "recipes" / "tiny-llava-trim-fp32.yaml", tmp_path / "out").manifest
    assert manifest.proofs["onnxruntime end to end"].startswith("passed")
    assert manifest.program.vision[0].tokens == 99
