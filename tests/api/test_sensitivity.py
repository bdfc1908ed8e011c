"""What quantization does to answers, on a small model: rounding that flips a selection, choices held, units, budgets, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests._tiny import tmc  # noqa: E402
from tests.families._small import save_small_llava  # noqa: E402
from tmc_export.api import budget, sensitivity  # noqa: E402
from tmc_export.api.budget import allowed_changes, fewest  # noqa: E402
from tmc_export.api.measuring import effect_of  # noqa: E402
from tmc_export.api.score_inputs import score_inputs  # noqa: E402
from tmc_export.api.sensitivity import Bench, explain, measure, open_bench  # noqa: E402
from tmc_export.api.simulation import Simulation  # noqa: E402
from tmc_export.api.units import units_of  # noqa: E402
from tmc_export.core.errors import LegalityError, RecipeError  # noqa: E402
from tmc_export.plan.make import make_plan  # noqa: E402
from tmc_export.quantize._weights import is_kept  # noqa: E402
from tmc_export.quantize.calibrated import Calibrated  # noqa: E402
from tmc_export.recipe import load_recipe  # noqa: E402

TEXT = """recipe: 1
name: small
model: {source: ./model, dtype: float32}
inputs: {images: 1, text_tokens: 32, new_tokens: 8, chunk: 8}
compress: [{at: decoder.1, method: fastv, keep: 4}]
quantize:
  # what nobody asked for
  encoder: {weights: int8}
  decoder: {weights: int4, block: 32, keep: [layers.1.mlp.down_proj]}   # kept by hand
target: {device: cpu, runtime: onnxruntime}
"""
ASKED = ("what is it", "the one on the left", "a thing of the other", "in it", "how many are there", "is the one in the other")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("sensitivity")
    save_small_llava(folder / "model", "llama", layers=2, vision_layers=2, hidden=64, image_size=42)
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (42, 42, 3), np.uint8)).save(folder / "pictures" / f"{number}.png")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ASKED), "utf-8")
    (folder / "recipe.yaml").write_text(TEXT, "utf-8")
    return folder


def given(home: Path) -> tuple[Any, ...]:
    return "--images", home / "pictures", "--prompts", home / "prompts.jsonl"


@pytest.fixture(scope="module")
def once(home: Path) -> Iterator[None]:
    """The model is traced once, whatever the recipe's `quantize` says."""
    recipe, right, made = load_recipe(home / "recipe.yaml"), sensitivity._open, []

    def opened(other: Any, progress: Any) -> Any:
        if not made:
            made.append(right(recipe, progress)[1])
        return make_plan(other, made[0].files)[0], made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "_open", opened)
        yield


@pytest.fixture(scope="module")
def bench(home: Path, once: None) -> Iterator[Bench]:
    recipe = load_recipe(home / "recipe.yaml")
    samples = sensitivity.questions_of(recipe, None, home / "pictures", home / "prompts.jsonl")
    with open_bench(recipe, samples, tokens=4) as found:
        yield found


# ------------------------------------------------------------------------------------------------------------- what is measured
def test_rounding_nothing_changes_nothing(bench: Bench) -> None:
    for frozen in (False, True):
        effect = effect_of(bench.measuring.compare((), frozen=frozen, answers=True))
        assert (effect.sqnr_db, effect.kl, effect.first, effect.kept, effect.changed) == (float("inf"), 0.0, 6, 1.0, 0)


def test_choices_held_are_float32_s_where_rounding_flips_the_selection(bench: Bench) -> None:
    free, held = bench.measuring.both(bench.everything(), answers=True)
    assert held is not None and bench.measuring.kinds == {"fastv at decoder.1 (0.0)": "rows"}
    flipped = [f.kept is not None and f.kept < 1 for f in free]
    assert any(flipped), "the test needs a question whose selection flips"
    assert all(h.kept == 1.0 and h.choices for h in held) and not all(f.choices for f in free)
    for f, h, other in zip(free, held, flipped, strict=True):
        assert h.noise > 0 and ((abs(f.noise - h.noise) > 1e-6 * h.noise) if other else f.noise == pytest.approx(h.noise, rel=1e-6))


def test_where_nothing_flips_the_two_runs_are_one(bench: Bench) -> None:
    """Behind the cut nothing that is rounded can flip it: both runs are the same, and made once unless asked for."""
    (behind,) = [u for u in units_of(bench.simulation, "layer") if u.part == "decoder" and u.label == "layers.1"]
    free, held = bench.measuring.both(behind.names, answers=False)
    assert held is free and free == bench.measuring.compare(behind.names, frozen=True, answers=False)
    assert effect_of(free).changed is None and effect_of(free).kl > 0


def test_each_subgraph_on_float32_s_inputs(bench: Bench) -> None:
    found = bench.noise()
    assert found.keys() == {"vision_0", "embed", "block_0", "compress_1", "block_1"}
    assert found["embed"] == {"hidden": float("inf")} and found["compress_1"] == {
        "hidden_out": float("inf")
    }  # nothing of theirs is rounded
    assert 25 < found["vision_0"]["tokens"] < 60 and 5 < found["block_0"]["hidden_out"] < 40
    assert all(5 < db < 40 for db in found["block_1"].values()) and found["block_1"].keys() == {"logits", "keys", "values"}


def test_another_scheme_takes_float32_s_answers_as_they_are(home: Path, once: None, tmp_path: Path) -> None:
    other = home / "other.yaml"
    other.write_text(TEXT.replace("weights: int4, block: 32", "weights: int8"), "utf-8")
    said: list[str] = []
    recipe = load_recipe(home / "recipe.yaml")
    samples = sensitivity.questions_of(recipe, None, home / "pictures", home / "prompts.jsonl")
    with open_bench(recipe, samples, tokens=4, progress=said.append) as first:
        asked = sum(line.startswith("float32") for line in said)
        with first.with_recipe(load_recipe(other), 4) as second:
            assert sum(line.startswith("float32") for line in said) == asked == len(samples)
            mine = second.measuring.both(second.everything(), answers=True)
        other.write_text(TEXT.replace("keep: 4}", "keep: 3}"), "utf-8")
        with pytest.raises(ValueError, match="differs from small in more than quantize"), first.with_recipe(load_recipe(other), 4):
            pass
        other.write_text(TEXT.replace("weights: int4, block: 32", "weights: int8"), "utf-8")
        with first.with_recipe(load_recipe(other), 3) as shorter:
            assert sum(line.startswith("float32") for line in said) == 2 * asked, "answers of another length are others"
            assert all(len(a.tokens) <= 3 for a in shorter.measuring.baselines)
        assert mine != first.measuring.both(first.everything(), answers=True)
    with open_bench(other, samples, tokens=4) as anew:
        assert mine == anew.measuring.both(anew.everything(), answers=True)


@pytest.mark.parametrize("by", ["part", "layer", "linear"])
def test_units_hold_every_rounded_weight_once_and_keep_names_no_other(by: Any, bench: Bench) -> None:
    units, targets = units_of(bench.simulation, by), bench.simulation.targets
    names = [name for unit in units for name in unit.names]
    assert sorted(names) == sorted(targets) and not any("layers.1.mlp.down_proj" in n and targets[n].part == "decoder" for n in names)
    for unit in units:
        mine = {t.name for t in targets.values() if t.part == unit.part and is_kept(t.name, unit.words)}
        assert mine == set(unit.names), unit
    labels = {f"{u.part} {u.label}".strip() for u in units}
    assert {"part": "encoder", "layer": "decoder layers.0", "linear": "decoder layers.0.self_attn.q_proj"}[by] in labels


def test_measure_and_explain_say_the_same_of_everything(home: Path, bench: Bench, once: None) -> None:
    samples = bench.samples[:2]
    whole = measure(home / "recipe.yaml", samples, tokens=4)
    assert len(whole.end_to_end) == 2 and whole.frozen is not None and whole.sqnr_db["compress_1"]["hidden_out"] == float("inf")
    told = explain(home / "recipe.yaml", samples, by="part", tokens=4)
    assert told.total.end_to_end == effect_of(whole.end_to_end) and told.total.frozen == effect_of(whole.frozen)
    assert [r.end_to_end.kl for r in told.rows] == sorted((r.end_to_end.kl for r in told.rows), reverse=True)
    assert {r.unit.part for r in told.rows} == {"encoder", "decoder"} and told.kept == {"decoder": ("layers.1.mlp.down_proj",)}
    (score,) = told.scores
    assert score.reads == "query and key of decoder layer 0" and score.state == "follow their layer (int4)"


@pytest.mark.parametrize(("keep", "says"), [
    ("layers.0", "pinned by keep"), ("layers.0.self_attn.q_proj", "k_proj follow their layer (int4), the rest is kept"),
])  # fmt: skip
def test_projections_that_keep_pins_are_told(keep: str, says: str, home: Path, bench: Bench) -> None:
    plan, _ = make_plan(load_recipe(home / "recipe.yaml").with_keep({"decoder": [keep]}), bench._model.files)
    simulation = Simulation(plan, bench._model.eager, Calibrated())
    assert says in score_inputs(plan, simulation)[0].state


def test_a_matrix_that_is_no_weight_of_the_checkpoint_is_not_left_out_in_silence(bench: Bench) -> None:
    eager = bench._model.eager
    reads = {file: [*found, *[replace(r, name="val_4") for r in found[:1]]] for file, found in eager.reads.items()}
    with pytest.raises(RecipeError, match=r"quantize\.\w+: a graph multiplies with 'val_4'.* not measured yet"):
        Simulation(bench.plan, replace(eager, reads=reads), Calibrated())


# ------------------------------------------------------------------------------------------------------------- the command
def test_the_table(home: Path, once: None) -> None:
    ran = tmc("quantize", home / "recipe.yaml", "--explain", *given(home), "--samples", 2)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("small: 2 questions") and "end to end" in lines[1] and "choices held" in lines[1]
    assert any(line.startswith("decoder layers.0") for line in lines) and any(line.startswith("everything ") for line in lines)
    assert "of 2 answers change end to end" in ran.out and "whole answers were not decoded" in ran.out
    assert "score, top-k and gather is never quantized" in ran.out and "float32 2/2" in ran.err
    data = json.loads(tmc("quantize", home / "recipe.yaml", "--explain", *given(home), "--samples", 1, "--answers", "--json").out)
    assert data["decoded"] == {"rows": True, "total": True} and data["rows"][0]["end_to_end"]["changed"] in (0, 1)
    assert data["subgraphs"]["embed"] == {"hidden": "inf"} and data["quantized_scores"] is False


def test_a_budget_pins_the_fewest_of_the_worst(home: Path, once: None) -> None:
    out = home / "elsewhere" / "fitted.yaml"
    out.parent.mkdir()
    ran = tmc("quantize", home / "recipe.yaml", "--budget", "0%", *given(home), "--tokens", 4, "-o", out, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["before"] > 0 == found["after"] == found["allowed"] and 0 < len(found["pinned"]) <= found["units"]
    text = out.read_text("utf-8")
    assert (
        "# what nobody asked for" in text and "# kept by hand" in text and "layers.1.mlp.down_proj" in text and "source: ../model" in text
    )
    fitted = load_recipe(out)
    for part, words in found["keep"].items():
        assert set(words) < set(fitted.quantize.part(part).keep) | {""} and fitted.quantize.part(part).weights in ("int4", "int8")
    samples = sensitivity.questions_of(fitted, None, home / "pictures", home / "prompts.jsonl")
    with open_bench(fitted, samples, tokens=4) as again:
        changed = [c.answer for c in again.measuring.compare(again.everything(), frozen=False, answers=True)] if again.everything() else []
    assert all(changed)
    loose = tmc("quantize", home / "recipe.yaml", "--budget", "99%", *given(home), "-o", out, "--tokens", 4)
    assert loose.code == 2 and "--force" in loose.error()
    loose = tmc("quantize", home / "recipe.yaml", "--budget", "99%", *given(home), "-o", out, "--tokens", 1, "--force")
    assert loose.code == 0 and "0 of" in loose.out and "nothing has to be kept" in loose.out  # the twin
    assert load_recipe(out).quantize == load_recipe(home / "recipe.yaml").quantize


def test_a_budget_that_cannot_be_met(home: Path, once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget._Search, "_count", lambda *_: 5)
    ran = tmc("quantize", home / "recipe.yaml", "--budget", "50%", *given(home))
    assert ran.code == 3 and "5 of 6 answers change with all" in ran.error() and "3 may" in ran.error()
    assert not (home / "recipe-fitted.yaml").exists()


MISTAKES: list[tuple[str, str, tuple[str, ...], int, tuple[str, ...]]] = [
    ("neither", TEXT, (), 2, ("--explain or --budget",)),
    ("both", TEXT, ("--explain", "--budget", "1%"), 2, ("one of them",)),
    ("an output that nothing writes", TEXT, ("--explain", "-o", "x.yaml"), 2, ("writes nothing",)),
    ("no questions", TEXT, ("--explain",), 2, ("recipe.yaml:6:1", "no quantize.calibration", "--prompts FILE.jsonl")),
    ("pictures without questions", TEXT, ("--explain", "--images", "pictures"), 2, ("give --prompts FILE",)),
    ("questions without pictures", TEXT, ("--explain", "--prompts", "prompts.jsonl"), 2, ("--images DIR",)),
    ("no such file", TEXT, ("--explain", "--images", "pictures", "--prompts", "gone.jsonl"), 2, ("--prompts: cannot read",)),
    (
        "too few questions",
        TEXT,
        ("--budget", "0.5%", "--images", "pictures", "--prompts", "prompts.jsonl"),
        3,
        ("6 questions", "at least 200"),
    ),
    ("no share", TEXT, ("--budget", "0.5"), 2, ("percentage such as",)),
    ("all of them", TEXT, ("--budget", "100%", "--images", "pictures", "--prompts", "prompts.jsonl"), 2, ("below 100%",)),
]


@pytest.mark.parametrize(("text", "args", "code", "says"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_told(home: Path, text: str, args: tuple[str, ...], code: int, says: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text.replace("./model", str(home / "model")), "utf-8")
    ran = tmc("quantize", tmp_path / "recipe.yaml", *[home / a if a in ("pictures", "prompts.jsonl") else a for a in args])
    assert ran.code == code and all(part in ran.err for part in says) and "Traceback" not in ran.err, ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_that_quantizes_nothing(home: Path, tmp_path: Path) -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith(("quantize", "  "))]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n", "utf-8")
    ran = tmc("quantize", tmp_path / "recipe.yaml", "--explain", *given(home))
    assert ran.code == 2 and "the recipe quantizes nothing" in ran.error()


# ------------------------------------------------------------------------------------------------------------- rules
def test_a_budget_is_worth_an_answer_at_least() -> None:
    assert [allowed_changes(0.005, n) for n in (200, 399, 400)] == [1, 1, 2] and allowed_changes(0.1, 10) == 1
    with pytest.raises(LegalityError, match=r"199 questions cannot show 0\.5%: .*at least 200 questions"):
        allowed_changes(0.005, 199)
    with pytest.raises(RecipeError, match="below 100%"):
        allowed_changes(-0.1, 10)


def test_bisection_tries_what_it_returns() -> None:
    tried: list[int] = []

    def within(pinned: int) -> bool:
        tried.append(pinned)
        return pinned >= 6

    assert fewest(40, within) == 6 and 6 in tried and 5 in tried and len(tried) < 10
    assert fewest(3, lambda n: n > 3) is None and fewest(0, lambda n: False) is None and fewest(5, lambda n: True) == 0


def test_an_effect_sums_up(bench: Bench) -> None:
    one = bench.measuring.compare((), frozen=False, answers=False)[0]
    pair = [replace(one, signal=100.0, noise=1.0, kl=0.2, kept=1.0), replace(one, signal=100.0, noise=1.0, kl=0.4, kept=0.5, first=False)]
    effect = effect_of(pair)
    assert effect.sqnr_db == pytest.approx(20.0) and effect.kl == pytest.approx(0.3) and (effect.first, effect.kept) == (1, 0.75)
