"""`tmc-export fit`: the copy it writes, and every mistake as one line that leaves the folder as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests._tiny import RECIPE, listing, save_tiny_model, tmc, write_recipe

FIT = RECIPE.replace(
    "  - {at: decoder.1, method: fastv, keep: 4}",
    "  # found on pictures of ours\n  - {at: decoder.1, method: fitprune}   # 9 visual tokens",
)
VTW = FIT.replace("fitprune", "vtw")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two decoder layers and 9 visual tokens, random."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Path:
    """A folder with the model, `recipe.yaml` that FIT says, and `pictures/` with two pictures and questions."""
    (tmp_path / "model").symlink_to(model)
    write_recipe(tmp_path, FIT)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draw = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(draw.integers(0, 255, (60, 48, 3), np.uint8)).save(pictures / name)
    asked = [{"picture": name, "question": question} for name in ("a.png", "b.png") for question in ("what is it", "how many")]
    (pictures / "questions.json").write_text(json.dumps(asked), "utf-8")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- what it writes
def test_a_copy_with_the_table(place: Path) -> None:
    ran = tmc("fit", place / "recipe.yaml", "--pictures", place / "pictures", "--flops", "95%", "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert result["method"] == "fitprune" and result["at"] == "decoder.1" and result["prompts"] == 4 and result["goals"] == {"flops": 0.95}
    (deleted,) = result["options"]["delete"]
    assert 0 < deleted < 9 and result["operations"] <= 0.95 and result["cuts"] > 0
    out = place / "recipe-fitted.yaml"
    assert result["recipe"] == str(out)
    wanted = FIT.replace("method: fitprune}", f"method: fitprune, delete: [{deleted}]" + "}")
    # comments, order and form as they were; only the blanks before a comment follow the longer line
    assert re.sub(" +#", " #", out.read_text("utf-8")) == re.sub(" +#", " #", wanted)
    assert (place / "recipe.yaml").read_text("utf-8") == FIT
    shown = tmc("plan", out, "--json")
    assert shown.code == 0, shown.err
    assert f'"visual_out": {9 - deleted}' in shown.out


def test_the_goal_decides(place: Path) -> None:
    """A lower goal deletes more; one token fewer would not have met it."""
    from tmc_export.plan.estimate import Clock, estimate
    from tmc_export.plan.resolve import resolve
    from tmc_export.plan.source import read_model_files
    from tmc_export.recipe import load_recipe

    files = read_model_files(place / "model")
    recipe = load_recipe(place / "recipe.yaml")
    whole = estimate(resolve(recipe.without_entry(0), files), Clock(None, None), "onnxruntime").flops["prefill"]
    counts = []
    for goal in (0.97, 0.92):
        ran = tmc("fit", place / "recipe.yaml", "--pictures", place / "pictures", "--flops", f"{goal:%}", "--force", "--json")
        assert ran.code == 0, ran.err
        found = json.loads(ran.out)
        counts.append(found["options"]["delete"][0])
        plan = resolve(load_recipe(place / "recipe-fitted.yaml"), files)
        left = estimate(plan, Clock(None, None), "onnxruntime").flops["prefill"] / whole
        assert left == pytest.approx(found["operations"]) and left <= goal
    assert counts[0] < counts[1]


def test_a_copy_elsewhere_finds_the_model(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "deep" / "er"
    other.mkdir(parents=True)
    ran = tmc("fit", place / "recipe.yaml", "--pictures", place / "pictures", "--flops", "95%", "-o", other / "x.yaml")
    assert ran.code == 0, ran.err
    assert "deleted" in ran.out and "operations left" in ran.out and "4 prompts" in ran.out
    assert "source: ../../model" in (other / "x.yaml").read_text("utf-8")
    assert tmc("plan", other / "x.yaml").code == 0
    assert [path.name for path in other.iterdir()] == ["x.yaml"]


def test_the_layer_of_vtw(place: Path) -> None:
    write_recipe(place, VTW)
    ran = tmc("fit", place / "recipe.yaml", "--pictures", place / "pictures", "--divergence", "100", "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert result["at"] == "decoder.1" and result["options"] == {} and float(result["rows"][0][1]) > 0
    ran = tmc("fit", place / "recipe.yaml", "--pictures", place / "pictures", "--divergence", "1e-12", "--force")
    assert ran.code == 3 and "recipe.yaml:7:5" in ran.error() and "below 1e-12 at no layer" in ran.error()


def test_questions_as_text_are_asked_about_every_picture(place: Path) -> None:
    (place / "asked.txt").write_text("what is it\n\nwhere is it\nhow many\n", "utf-8")
    given = ("--pictures", place / "pictures", "--prompts", place / "asked.txt", "--flops", "95%", "--json")
    assert json.loads(tmc("fit", place / "recipe.yaml", *given).out)["prompts"] == 6
    assert json.loads(tmc("fit", place / "recipe.yaml", *given, "--samples", 4, "--force").out)["prompts"] == 4


def test_prompts_are_spread_over_all() -> None:
    from tmc_export.api.fitting import spread
    from tmc_export.verify.statistics import Question

    ten = [Question(Path(f"{i}.png"), "") for i in range(10)]
    assert [q.picture.stem for q in spread(ten, 4)] == ["0", "2", "5", "7"]
    assert spread(ten, 99) == ten


# ------------------------------------------------------------------------------------------------------------- mistakes
TWICE = FIT.replace("# 9 visual tokens", "").replace("method: fitprune}", "method: fitprune}\n  - {at: decoder.1, method: vtw}")
MISTAKES: list[tuple[str, str, tuple[str, ...], int, tuple[str, ...]]] = [
    ("a method that has nothing to fit", RECIPE, (), 2, ("recipe.yaml:5", "(fastv) has anything to fit", "fitprune, vtw")),
    ("that method by its number", RECIPE, ("--entry", "0"), 2, ("recipe.yaml:6", "'fastv' has nothing to fit")),
    ("no such entry", FIT, ("--entry", "1"), 2, ("--entry 1", "has 1 entries")),
    ("two that can be fitted", TWICE, (), 2, ("0: fitprune, 1: vtw", "--entry N")),
    ("another entry cuts the decoder", TWICE, ("--entry", "0"), 3, ("recipe.yaml:7:5", "decoder.1", "in a recipe of its own")),
    ("another method's goal", FIT, ("--divergence", "0.1"), 2, ("--divergence", "--flops", "leave --divergence out")),
    ("no share", FIT, ("--flops", "0.4"), 2, ("0.4", "percentage such as 40%")),
    ("all of it", FIT, ("--flops", "100%"), 2, ("--flops", "between 0% and 100%")),
    ("less than nothing", VTW, ("--divergence", "-1"), 2, ("--divergence", "more than 0")),
    ("out of reach", FIT, ("--flops", "1%"), 3, ("recipe.yaml:7:5", "1.0%", "cannot be reached", "ask for more")),
    ("a wrong option", FIT.replace("fitprune}", "fitprune, delte: [1]}"), (), 2, ("recipe.yaml:7", "no option 'delte'", "delete")),
    ("no pictures in the recipe", FIT.replace("images: 1", "images: 0"), (), 3, ("recipe.yaml:7:5", "inputs.images")),
    ("no folder of pictures", FIT, ("--pictures", "nowhere"), 2, ("'nowhere' does not exist",)),
    ("no file of questions", FIT, ("--prompts", "nowhere.txt"), 2, ("nowhere.txt", "check the path")),
    ("an output in no folder", FIT, ("-o", "no/where/x.yaml"), 2, ("no/where", "does not exist")),
]


@pytest.mark.parametrize(("text", "args", "code", "says"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line(place: Path, text: str, args: tuple[str, ...], code: int, says: tuple[str, ...]) -> None:
    write_recipe(place, text)
    before = listing(place)
    ran = tmc("fit", place / "recipe.yaml", "--pictures", place / "pictures", *args)
    assert ran.code == code, ran.err
    assert all(part in ran.error() for part in says), ran.err
    assert listing(place) == before


def test_no_pictures_at_all(place: Path) -> None:
    before = listing(place)
    ran = tmc("fit", place / "recipe.yaml")
    assert ran.code == 2 and "give --pictures DIR" in ran.error()
    (place / "pictures" / "questions.json").unlink()
    ran = tmc("fit", place / "recipe.yaml", "--pictures", place / "pictures")
    assert ran.code == 2 and "--prompts FILE" in ran.error()
    assert set(listing(place)) == set(before) - {"pictures/questions.json"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[{", "not valid JSON"),
        ("[]", "holds 0 questions"),
        ('["what"]', "item 1"),
        ('[{"picture": "a.png"}]', "item 1"),
        ('[{"picture": "c.png", "question": "what"}]', "'c.png'"),
        ("\n", "holds 0 questions"),
        ('[{"picture": "a.png", "question": "an <image> of"}]', "2 image placeholders"),
    ],
)
def test_questions_that_cannot_be_asked(place: Path, text: str, says: str) -> None:
    (place / "pictures" / "questions.json").write_text(text, "utf-8")
    ran = tmc("fit", place / "recipe.yaml", "--pictures", place / "pictures")
    assert ran.code == 2 and says in ran.error()


def test_an_output_that_exists_is_left_alone(place: Path) -> None:
    out = place / "mine.yaml"
    out.write_text("years of work")
    given = ("fit", place / "recipe.yaml", "--pictures", place / "pictures", "--flops", "95%", "-o", out)
    ran = tmc(*given)
    assert ran.code == 2 and "--force" in ran.error() and out.read_text() == "years of work"
    ran = tmc(*given, "--force")
    assert ran.code == 0 and "fitprune" in out.read_text()


def test_a_copy_that_says_something_else_is_not_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is read back; the twin of the tests that it is right."""
    from tmc_export.core.errors import RecipeError
    from tmc_export.recipe import load_recipe, rewrite

    monkeypatch.setattr(rewrite, "_changed", lambda *_: FIT)
    before = listing(place)
    with pytest.raises(RecipeError, match="would say something else"):
        rewrite.write_fitted(load_recipe(place / "recipe.yaml"), 0, "decoder.1", {"delete": [3]}, place / "out.yaml")
    assert listing(place) == before


# ------------------------------------------------------------------------------------------------------------- the shipped model
@pytest.mark.slow
def test_the_shipped_recipes_are_fitted_and_built(tmp_path: Path, repository: Path) -> None:
    for name, goal in (("fitprune", ("--flops", "60%")), ("vtw", ("--divergence", "0.5"))):
        out = tmp_path / f"{name}.yaml"
        ran = tmc("fit", repository / "recipes" / f"tiny-llava-{name}-fp32.yaml", "-o", out, "--samples", 6, *goal)
        assert ran.code == 0, ran.err
        ran = tmc("build", out, "-o", tmp_path / name, "-q")
        assert ran.code == 0, ran.err
        ran = tmc("verify", tmp_path / name)
        assert ran.code == 0, ran.err
