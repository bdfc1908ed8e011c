"""A fitted copy of a recipe: what stays, what changes, and paths that lead to the same files from elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tmc_export.core.errors import RecipeError
from tmc_export.recipe import load_recipe, rewrite
from tmc_export.recipe.recipe import Recipe
from tmc_export.recipe.rewrite import write_fitted, write_kept

TEXT = """\
# the first line
recipe: 1
name: a-recipe
model:
  source: ./model   # beside it
  dtype: float32
inputs: {images: 1, text_tokens: 1_000, new_tokens: 0x10, image_size: [84, 84]}
compress:
  - {at: encoder, method: pool, grid: [2, 2], weights: {file: w/x.safetensors}}
  # found on pictures
  - at: decoder.1
    method: fitprune
    scope: 'image'  # quoted
    # the table follows
    delete: [1, 2]
  - {at: decoder.3, method: vtw}  # after that

target: {device: ./board.yaml, runtime: onnxruntime}
"""


@pytest.fixture
def recipe(tmp_path: Path, repository: Path) -> Path:
    (tmp_path / "a" / "model").mkdir(parents=True)
    shutil.copy(repository / "devices" / "cpu.yaml", tmp_path / "a" / "board.yaml")
    path = tmp_path / "a" / "recipe.yaml"
    path.write_text(TEXT, "utf-8")
    return path


def test_only_the_entry_changes(recipe: Path) -> None:
    out = recipe.with_name("out.yaml")
    write_fitted(load_recipe(recipe), 1, "decoder.2", {"delete": [0, 5, 3]}, out)
    wanted = TEXT.replace("at: decoder.1", "at: decoder.2").replace("[1, 2]\n", "[0, 5, 3]\n")
    assert out.read_text("utf-8") == wanted


def test_an_option_that_was_not_there(recipe: Path) -> None:
    recipe.write_text(TEXT.replace("    # the table follows\n    delete: [1, 2]\n", ""), "utf-8")
    out = recipe.with_name("out.yaml")
    write_fitted(load_recipe(recipe), 1, "decoder.2", {"delete": [0, 5]}, out)
    assert load_recipe(out).compress[1].options == {"delete": [0, 5]}
    assert "delete: [0, 5]" in out.read_text("utf-8") and "# quoted" in out.read_text("utf-8")


def test_paths_lead_to_the_same_files(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "b" / "c"
    other.mkdir(parents=True)
    before = load_recipe(recipe)
    write_fitted(before, 2, "decoder.2", {}, other / "out.yaml")
    after = load_recipe(other / "out.yaml")
    assert after.model.source == "../../a/model" and after.model_folder() == before.model_folder()
    assert after.weights_file(0) == before.weights_file(0)
    assert after.target.device == "../../a/board.yaml"
    assert [path.name for path in other.iterdir()] == ["out.yaml"]


def test_a_hub_id_is_no_path(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(TEXT.replace("./model ", "some/model "), "utf-8")
    write_fitted(load_recipe(recipe), 2, "decoder.2", {}, tmp_path / "out.yaml")
    assert load_recipe(tmp_path / "out.yaml").model.source == "some/model"


def test_a_recipe_without_a_file(recipe: Path, tmp_path: Path) -> None:
    made = Recipe.model_validate(load_recipe(recipe).model_dump())
    with pytest.raises(RecipeError, match="has no file to copy"):
        write_fitted(made, 2, "decoder.2", {}, tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()


def test_entries_behind_one_that_is_left_out_keep_their_lines(recipe: Path) -> None:
    whole = load_recipe(recipe)
    less = whole.without_entry(1)
    assert [e.method for e in less.compress] == ["pool", "vtw"]
    assert less.origin(("compress", 0, "method")) == whole.origin(("compress", 0, "method"))
    assert less.origin(("compress", 1, "method")) == whole.origin(("compress", 2, "method")) != whole.origin(("compress", 1, "method"))
    assert less.origin(("inputs",)) == whole.origin(("inputs",))
    assert less.weights_file(0) == whole.weights_file(0)


def test_an_entry_with_other_options_keeps_its_line(recipe: Path) -> None:
    whole = load_recipe(recipe)
    other = whole.with_entry(1, "decoder.2", {"delete": [0, 9]})
    assert other.compress[1].options == {"delete": [0, 9]} and other.compress[1].at == "decoder.2"
    assert other.compress[0] == whole.compress[0] and other.compress[2] == whole.compress[2]
    assert other.origin(("compress", 1)) == whole.origin(("compress", 1))


QUANTIZED = TEXT.replace(
    "target: {",
    "quantize:\n  encoder: {weights: int8, activations: int8}  # all of it\n"
    "  decoder:\n    weights: int8  # by hand\n    keep: [layers.0]\n"
    "  calibration: {images: pictures, prompts: asked.jsonl}\ntarget: {",
)


def test_words_are_kept_where_there_were_some_and_where_there_were_none(recipe: Path) -> None:
    recipe.write_text(QUANTIZED, "utf-8")
    out = recipe.with_name("out.yaml")
    write_kept(load_recipe(recipe), {"decoder": ["layers.0", "layers.2"], "encoder": ["fc1"]}, out)
    wanted = QUANTIZED.replace("[layers.0]", "[layers.0, layers.2]").replace("activations: int8}  #", "activations: int8, keep: [fc1]} #")
    assert out.read_text("utf-8") == wanted


def test_calibration_data_are_the_same_files_from_elsewhere(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(QUANTIZED, "utf-8")
    other = tmp_path / "b" / "c"
    other.mkdir(parents=True)
    write_kept(load_recipe(recipe), {"decoder": ["layers.1"]}, other / "out.yaml")
    calibration = load_recipe(other / "out.yaml").quantize.calibration
    assert calibration is not None and (calibration.images, calibration.prompts) == ("../../a/pictures", "../../a/asked.jsonl")


def test_a_copy_that_keeps_something_else_is_not_written(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is read back; the twin of the tests that it is right."""
    recipe.write_text(QUANTIZED, "utf-8")
    monkeypatch.setattr(rewrite, "_changed", lambda *_: QUANTIZED)
    with pytest.raises(
        RecipeError, match=r"would say something else than was fitted; write quantize\.decoder\.keep: \[layers\.1\] by hand"
    ):
        write_kept(load_recipe(recipe), {"decoder": ["layers.1"]}, recipe.with_name("out.yaml"))
    assert not recipe.with_name("out.yaml").exists()
