"""Wrong recipes through the command line: `build` and `plan` say the same line, exit with 2 or 3, and write nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests._tiny import RECIPE, listing, tmc, write_recipe

LINES = RECIPE.splitlines()


def line(number: int, text: str) -> str:
    """Return the good recipe with one line (1-based) replaced."""
    return "\n".join([*LINES[: number - 1], text, *LINES[number:]]) + "\n"


def entry(text: str) -> str:
    """Return the good recipe with another compression entry."""
    return line(6, f"  - {{{text}}}")


def inputs(text: str) -> str:
    return line(4, f"inputs: {{{text}}}")


# name, text, exit code, what the line must say
WRONG: list[tuple[str, str, int, tuple[str, ...]]] = [
    # the file's form
    ("empty file", "", 2, ("recipe.yaml", "empty")),
    ("no YAML", line(4, "inputs: {images: 1"), 2, ("recipe.yaml:", "not valid YAML")),
    ("tab", line(6, "\t- {at: decoder.1}"), 2, ("recipe.yaml:6", "spaces, not tabs")),
    ("a list", "- recipe: 1\n", 2, ("a recipe is a mapping",)),
    ("newer schema", line(1, "recipe: 7"), 2, ("schema 7 is newer", "upgrade")),
    ("unknown key", line(3, "modle: {source: ./model}\nmodel: {source: ./model, dtype: float32}"), 2, ("unknown key 'modle'", "'model'")),
    ("missing key", line(2, "# no name"), 2, ("'name' is missing",)),
    ("duplicate key", RECIPE + "name: again\n", 2, ("duplicate key 'name'",)),
    ("wrong type", inputs("images: two, text_tokens: 32, new_tokens: 16"), 2, ("recipe.yaml:4", "inputs.images", "'two'")),
    ("negative", inputs("images: 1, text_tokens: -4, new_tokens: 16"), 2, ("inputs.text_tokens", "-4")),
    ("bad dtype", line(3, "model: {source: ./model, dtype: float61}"), 2, ("model.dtype", "float61", "float16")),
    ("module path", entry("at: projector, method: os.system"), 2, ("registered name", "os.system")),
    ("python tag", line(2, "name: !!python/object/apply:os.system [id]"), 2, ("tags are not used",)),
    # methods, options, budgets
    ("unknown method", entry("at: decoder.1, method: fastw, keep: 4"), 2, ("recipe.yaml:6", "fastw", "did you mean 'fastv'")),
    ("unknown option", entry("at: decoder.1, method: fastv, kepe: 4"), 2, ("recipe.yaml:6", "kepe", "keep")),
    ("option of another type", entry("at: decoder.1, method: fastv, keep: [4]"), 2, ("recipe.yaml:6", "keep")),
    ("bad budget", entry("at: decoder.1, method: fastv, keep: 50 percent"), 2, ("recipe.yaml:6", "50 percent")),
    ("budget of nothing", entry("at: decoder.1, method: fastv, keep: 0"), 2, ("recipe.yaml:6", "keep", "0")),
    ("above 100 percent", entry("at: decoder.1, method: fastv, keep: 150%"), 2, ("recipe.yaml:6", "150%")),
    ("keep above what arrives", entry("at: decoder.1, method: fastv, keep: 10"), 3, ("recipe.yaml:6", "10", "9")),
    ("pool mode", entry("at: projector, method: pool, kernel: 3, mode: medium"), 2, ("recipe.yaml:6", "medium")),
    # sites
    ("no site", entry("at: decoder.x, method: fastv, keep: 4"), 2, ("recipe.yaml:6", "decoder.x")),
    ("misspelt site", entry("at: projektor, method: pool, kernel: 3"), 2, ("recipe.yaml:6", "projektor")),
    ("site the method lacks", entry("at: projector, method: fastv, keep: 4"), 3, ("recipe.yaml:6", "fastv", "projector")),
    ("cut beyond the layers", entry("at: decoder.2, method: fastv, keep: 4"), 3, ("recipe.yaml:6", "decoder.2", "decoder.1")),
    ("no layer before", entry("at: decoder.0, method: fastv, keep: 4"), 3, ("recipe.yaml:6", "decoder.0", "decoder.1")),
    ("encoder layer beyond", entry("at: encoder.7.mid, method: tome, r: 2"), 3, ("recipe.yaml:6", "encoder.7")),
    ("no pictures", line(4, "inputs: {images: 0, text_tokens: 32, new_tokens: 16}"), 3, ("decoder.1", "inputs.images is 0")),
    # budget of inputs
    ("context too long", inputs("images: 1, text_tokens: 900, new_tokens: 200"), 3, ("recipe.yaml:4", "1109", "1024")),
    ("too many pictures", inputs("images: 120, text_tokens: 32, new_tokens: 16"), 3, ("recipe.yaml:4", "1024")),
    ("bucket", inputs("images: 1, image_size: [43, 42], text_tokens: 32, new_tokens: 16"), 3, ("recipe.yaml:4", "43")),
    ("several buckets", inputs("images: 1, image_size: [[42, 42], [28, 42]], text_tokens: 32, new_tokens: 16"), 3, ("2 buckets", "llava")),
    ("unknown fit", inputs("images: 1, fit: tiles, text_tokens: 32, new_tokens: 16"), 2, ("recipe.yaml:4", "tiles")),
    ("batch", inputs("images: 1, batch: 2, text_tokens: 32, new_tokens: 16"), 3, ("recipe.yaml:4", "batch", "not built yet")),
    # quantization and target
    ("unknown scheme", line(7, "quantize: {decoder: {weights: int44, block: 32}}"), 2, ("recipe.yaml:7", "int44", "int4")),
    ("int4 without block", line(7, "quantize: {decoder: {weights: int4}}"), 2, ("recipe.yaml:7", "block")),
    ("keep names nothing", line(7, "quantize: {decoder: {weights: int4, block: 32, keep: [mlp.dwn]}}"), 3, ("recipe.yaml:7", "mlp.dwn")),
    ("unknown device", line(8, "target: {device: jetson-agx-orin-65gb}"), 2, ("recipe.yaml:8", "jetson-agx-orin-64gb")),
    ("device file missing", line(8, "target: {device: ./mine.yaml}"), 2, ("recipe.yaml:8", "./mine.yaml")),
    ("fp8 on Orin", line(7, "quantize: {decoder: {weights: fp8}}").replace("device: cpu", "device: jetson-agx-orin-64gb"), 3, ("fp8",)),
    ("runtime without GPU", line(8, "target: {device: cpu, runtime: tensorrt}"), 3, ("recipe.yaml:8", "tensorrt", "cpu")),
    ("RTX on Orin", line(8, "target: {device: jetson-agx-orin-64gb, runtime: tensorrt-rtx}"), 3, ("recipe.yaml:8", "runtime: tensorrt")),
    ("bfloat16", line(3, "model: {source: ./model, dtype: bfloat16}"), 3, ("recipe.yaml:3", "bfloat16")),
    # model
    ("folder missing", line(3, "model: {source: ./modell, dtype: float32}"), 2, ("recipe.yaml:3", "./modell", "does not exist")),
    ("not a model folder", line(3, "model: {source: ./, dtype: float32}"), 2, ("recipe.yaml:3", "config.json")),
    ("hub id, offline", line(3, "model: {source: llava-hf/no-such-model, dtype: float32}"), 2, ("recipe.yaml:3", "HF_HUB_OFFLINE")),
    ("no hub id", line(3, "model: {source: 'a b/c', dtype: float32}"), 2, ("recipe.yaml:3", "'a b/c'")),
]


@pytest.mark.parametrize(("text", "code", "says"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
def test_one_line_and_nothing_written(text: str, code: int, says: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    recipe = write_recipe(tmp_path, text)
    before = listing(tmp_path)
    for verb in ("build", "plan"):
        ran = tmc(verb, recipe, *(["-o", tmp_path / "out"] if verb == "build" else []))
        error = ran.error()
        assert ran.code == code, error
        assert all(part in error for part in says), error
        assert ran.out == ""
    assert listing(tmp_path) == before


def test_there_are_many() -> None:
    assert len(WRONG) >= 30 and len({case[0] for case in WRONG}) == len(WRONG)


def test_the_good_recipe_is_good(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    assert tmc("plan", write_recipe(tmp_path)).code == 0


def test_several_problems_are_a_line_each(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    ran = tmc("build", write_recipe(tmp_path, line(4, "inputs: {imges: 1, text_tokens: 0, new_tokens: 16}")), "-o", tmp_path / "out")
    lines = ran.err.splitlines()
    assert ran.code == 2 and len(lines) == 2 and "imges" in lines[0] and "text_tokens" in lines[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--set", "compress.0.kep=4"], "kep"),
        (["--set", "compress.7.keep=4"], "compress.7"),
        (["--set", "inputs.images"], "inputs.images"),
        (["--device", "jetson-agx-orin"], "jetson-agx-orin-64gb"),
        (["--devise", "cpu"], "--devise"),
    ],
)
def test_wrong_settings(args: list[str], says: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    ran = tmc("build", write_recipe(tmp_path), "-o", tmp_path / "out", *args)
    assert ran.code == 2 and says in ran.error()
    assert not (tmp_path / "out").exists()


def test_paths_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff\x00")
    for name in (tmp_path / "none.yaml", tmp_path / "folder", tmp_path / "binary.yaml", "quickstrat"):
        ran = tmc("build", name, "-o", tmp_path / "out")
        assert ran.code == 2 and Path(str(name)).name in ran.error()
    assert not (tmp_path / "out").exists()
    assert tmc("build", "quickstart").code == 2  # no -o
    assert tmc("build").code == 2


def test_config_json(place: Path) -> None:
    config = place / "model" / "config.json"
    text = config.read_text()
    for wrong, says in [
        ("", "JSON"),
        ("{", "JSON"),
        ("[1, 2]", "list, not a mapping"),
        ("{}", "no family serves"),
        (text.replace("LlavaForConditionalGeneration", "GPT2LMHeadModel"), "GPT2LMHeadModel"),
        (text.replace('"hidden_size": 32', '"hidden_size": "32"'), "text_config.hidden_size"),
        (text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1000000000'), "num_hidden_layers"),
        (text.replace('"model_type": "llama"', '"model_type": "gpt2"'), "gpt2"),
        (text.replace('"text_config"', '"txt_config"'), "text_config"),
    ]:
        assert wrong != text
        config.write_text(wrong)
        for verb in ("build", "plan"):
            ran = tmc(verb, place / "recipe.yaml", *(["-o", place / "out"] if verb == "build" else []))
            assert ran.code == 2 and says in ran.error(), ran.err
    assert not (place / "out").exists()
    shutil.rmtree(place / "model")
    config.parent.mkdir()
    assert "config.json" in tmc("build", place / "recipe.yaml", "-o", place / "out").error()
