"""Wrong recipes: each must end in a RecipeError that names the place, the value received and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmc_export.core.errors import RecipeError
from tmc_export.recipe import load_recipe

GOOD = """\
recipe: 1
name: good
model: {source: some/model, dtype: float16}
inputs: {images: 1, text_tokens: 32, new_tokens: 16}
compress:
  - {at: decoder.2, method: fastv, keep: 50%}
quantize: {decoder: {weights: int4, block: 128}}
target: {device: cpu, runtime: onnxruntime}
"""
LINES = GOOD.splitlines()


def line(number: int, text: str) -> str:
    """Return the good recipe with one line (1-based) replaced."""
    return "\n".join([*LINES[: number - 1], text, *LINES[number:]]) + "\n"


# name, text, the places the message must name ("" for the file alone), what it must say
WRONG: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("unknown key", line(3, "modle: {source: a}"), "3:1", ("unknown key 'modle'", "did you mean 'model'", "allowed: recipe, name, model")),
    ("unknown key, missing key", line(3, "modle: {source: a}"), "1:1", ("the key 'model' is missing at the top level", "'modle'")),
    ("unknown nested key", line(4, "inputs: {imges: 1, text_tokens: 3, new_tokens: 1}"), "4:10", ("'imges' in inputs", "mean 'images'")),
    ("unknown key in a part", line(7, "quantize: {decodr: {weights: fp16}}"), "7:12", ("'decodr' in quantize", "mean 'decoder'", "kv")),
    (
        "unknown key in a scheme",
        line(7, "quantize: {decoder: {weights: int4, blok: 32}}"),
        "7:37",
        ("'blok' in quantize.decoder", "'block'"),
    ),
    (
        "missing required",
        line(4, "inputs: {images: 1, new_tokens: 16}"),
        "4:9",
        ("'text_tokens' is missing in inputs", "text tokens of all prompts"),
    ),
    ("missing source", line(3, "model: {dtype: float16}"), "3:8", ("'source' is missing in model", "hub id")),
    ("missing at", line(6, "  - {method: fastv, keep: 50%}"), "6:5", ("'at' is missing in compress.0", "decoder.2")),
    ("misspelt method key", line(6, "  - {at: decoder.2, metod: fastv}"), "6:5", ("'method' is missing in compress.0", "'metod'")),
    ("no name", line(2, "# no name"), "1:1", ("'name' is missing",)),
    ("version missing", line(1, "# nothing"), "2:1", ("schema version is missing", "recipe: 1")),
    ("version misspelt", line(1, "recpie: 1"), "1:1", ("schema version is missing", "did you mean 'recpie'")),
    ("newer version", line(1, "recipe: 2"), "1:9", ("schema 2 is newer", "upgrade tmc-export")),
    ("version as text", line(1, "recipe: one"), "1:9", ("must be 1", "got 'one'")),
    ("version as truth value", line(1, "recipe: true"), "1:9", ("must be 1", "got true")),
    ("version zero", line(1, "recipe: 0"), "1:9", ("must be 1", "got 0")),
    (
        "text for a number",
        line(4, "inputs: {images: two, text_tokens: 3, new_tokens: 1}"),
        "4:18",
        ("inputs.images must be a whole", "'two'"),
    ),
    ("quoted number", line(4, "inputs: {images: '2', text_tokens: 3, new_tokens: 1}"), "4:18", ("whole number", "got '2'")),
    ("fraction", line(4, "inputs: {text_tokens: 3.5, new_tokens: 1}"), "4:23", ("inputs.text_tokens must be a whole number", "got 3.5")),
    ("negative", line(4, "inputs: {images: -1, text_tokens: 3, new_tokens: 1}"), "4:18", ("inputs.images must be at least 0", "got -1")),
    ("zero tokens", line(4, "inputs: {text_tokens: 0, new_tokens: 1}"), "4:23", ("inputs.text_tokens must be at least 1", "got 0")),
    ("absurd count", line(4, "inputs: {text_tokens: 99999999999, new_tokens: 1}"), "4:23", ("must be at most 1000000", "99999999999")),
    ("truth value for a number", line(4, "inputs: {images: true, text_tokens: 3, new_tokens: 1}"), "4:18", ("whole number", "got true")),
    ("null for a number", line(4, "inputs: {images: null, text_tokens: 3, new_tokens: 1}"), "4:18", ("whole number", "got null")),
    (
        "enum",
        line(3, "model: {source: a/b, dtype: float61}"),
        "3:29",
        ("model.dtype must be 'float32', 'float16' or", "'float61'", "mean 'float16'"),
    ),
    ("enum turns", line(4, "inputs: {turns: frezee, text_tokens: 3, new_tokens: 1}"), "4:17", ("'freeze' or 'recompute'", "mean 'freeze'")),
    ("one side", line(4, "inputs: {image_size: [336], text_tokens: 3, new_tokens: 1}"), "4:22", ("[height, width]", "got [336]")),
    ("size as text", line(4, "inputs: {image_size: 336x336, text_tokens: 3, new_tokens: 1}"), "4:22", ("[height, width]", "336x336")),
    (
        "bad bucket",
        line(4, "inputs: {image_size: [[1, 2], [3]], text_tokens: 3, new_tokens: 1}"),
        "4:22",
        ("[height, width]", "[[1, 2], [3]]"),
    ),
    ("zero side", line(4, "inputs: {image_size: [0, 336], text_tokens: 3, new_tokens: 1}"), "4:22", ("[height, width]", "[0, 336]")),
    ("section as text", line(3, "model: llava"), "3:8", ("model must be a mapping", "got 'llava'")),
    ("section as list", line(8, "target: [cpu]"), "8:9", ("target must be a mapping", '["cpu"]')),
    ("compress as mapping", line(6, "  at: decoder.2"), "5:1", ("compress must be a list",)),
    ("entry as text", line(6, "  - fastv"), "6:5", ("compress.0 must be a mapping", "got 'fastv'")),
    ("module path", line(6, "  - {at: projector, method: os.system}"), "6:29", ("compress.0.method", "registered name", "os.system")),
    ("mapping as option", line(6, "  - {at: projector, method: pool, grid: {h: 1}}"), "6:41", ("compress.0.grid", "beside 'method'")),
    (
        "scope",
        line(6, "  - {at: projector, method: pool, scope: images}"),
        "6:42",
        ("compress.0.scope", "'image' or 'joint'", "mean 'image'"),
    ),
    ("empty site", line(6, "  - {at: '', method: pool}"), "6:10", ("compress.0.at must not be empty",)),
    ("slug", line(2, "name: My Recipe"), "2:7", ("name: must be lower-case letters", "'My Recipe'")),
    ("name as number", line(2, "name: 7"), "2:7", ("name must be text", "got 7")),
    (
        "not built",
        line(7, "quantize: {decoder: {weights: mxfp4}}"),
        "7:31",
        ("'mxfp4' is not built yet", "fp16, bf16, int8, int4, fp8 or nvfp4"),
    ),
    (
        "an algorithm as a scheme",
        line(7, "quantize: {decoder: {weights: awq}}"),
        "7:31",
        ("'awq' is no weight scheme", "weights: int4, algorithm: awq"),
    ),
    (
        "smoothing as a scheme",
        line(7, "quantize: {encoder: {weights: smoothquant}}"),
        "7:31",
        ("'smoothquant' is no weight scheme", "smooth: 0.5"),
    ),
    ("another name of nvfp4", line(7, "quantize: {decoder: {weights: fp4}}"), "7:31", ("'fp4' is no weight scheme; write nvfp4",)),
    (
        "activations that do not go with the weights",
        line(7, "quantize: {decoder: {weights: int4, block: 32, activations: int8}}"),
        "7:21",
        ("activations: int8 goes with weights: int8, not with int4",),
    ),
    (
        "unknown activations",
        line(7, "quantize: {decoder: {weights: int8, activations: int4}}"),
        "7:50",
        ("quantize.decoder.activations must be 'int8', 'fp8' or 'nvfp4', got 'int4'",),
    ),
    (
        "activations of the head",
        line(7, "quantize: {head: {weights: int8, activations: int8}}"),
        "7:18",
        ("activations are those of encoder, projector, decoder, not of head",),
    ),
    ("awq of int8", line(7, "quantize: {decoder: {weights: int8, algorithm: awq}}"), "7:21", ("algorithm: awq is for weights: int4",)),
    (
        "smoothing of weights alone",
        line(7, "quantize: {decoder: {weights: int8, smooth: 0.5}}"),
        "7:21",
        ("smooth moves the activations' range", "activations: int8, or remove it"),
    ),
    (
        "smoothing by more than all",
        line(7, "quantize: {decoder: {weights: int8, activations: int8, smooth: 1.5}}"),
        "7:64",
        ("quantize.decoder.smooth must be at most 1, got 1.5",),
    ),
    ("int8 with block", line(7, "quantize: {decoder: {weights: int8, block: 32}}"), "7:21", ("int8 takes no block",)),
    (
        "nvfp4 in other blocks",
        line(7, "quantize: {decoder: {weights: nvfp4, block: 32}}"),
        "7:21",
        ("weights: nvfp4 has blocks of 16, got block: 32",),
    ),
    (
        "int4 in blocks of 16",
        line(7, "quantize: {decoder: {weights: int4, block: 16}}"),
        "7:21",
        ("weights: int4 has blocks of 32 or 64 or 128, got block: 16",),
    ),
    ("nvfp4 of the head", line(7, "quantize: {head: {weights: nvfp4}}"), "7:18", ("nvfp4 is built for encoder, projector, decoder only",)),
    ("bf16 of the slots", line(7, "quantize: {kv: {weights: bf16}}"), "7:16", ("bf16 is built for", "not for kv")),
    ("layers of the slots", line(7, "quantize: {kv: {weights: fp16, keep: [layers.1]}}"), "7:16", ("keep names layers, and kv has none",)),
    ("calibration without prompts", line(7, "quantize: {calibration: {images: a}}"), "7:25", ("the key 'prompts' is missing",)),
    (
        "a percentile without its observer",
        line(7, "quantize: {calibration: {prompts: a.jsonl, percentile: 99.9}}"),
        "7:25",
        ("percentile has no effect with observer: minmax",),
    ),
    (
        "no such observer",
        line(7, "quantize: {calibration: {prompts: a.jsonl, observer: max}}"),
        "7:54",
        ("observer must be 'minmax', 'percentile', 'entropy' or 'mse', got 'max'",),
    ),
    ("no samples", line(7, "quantize: {calibration: {prompts: a.jsonl, samples: 0}}"), "7:53", ("samples must be at least 1, got 0",)),
    ("unknown scheme", line(7, "quantize: {decoder: {weights: int44}}"), "7:31", ("unknown weight scheme 'int44'", "mean 'int4'")),
    (
        "block size",
        line(7, "quantize: {decoder: {weights: int4, block: 100}}"),
        "7:44",
        ("quantize.decoder.block must be 16, 32, 64 or 128", "got 100"),
    ),
    ("int4 without block", line(7, "quantize: {decoder: {weights: int4}}"), "7:21", ("int4 needs a block", "32, 64 or 128")),
    ("fp16 with block", line(7, "quantize: {decoder: {weights: fp16, block: 32}}"), "7:21", ("fp16 takes no block",)),
    (
        "int4 encoder",
        line(7, "quantize: {encoder: {weights: int4, block: 32}}"),
        "7:21",
        ("int4 is built for decoder only, not for encoder",),
    ),
    (
        "device",
        line(8, "target: {device: jetson-agx-orin-64}"),
        "8:18",
        ("'jetson-agx-orin-64'", "mean 'jetson-agx-orin-64gb'", "shipped: cpu"),
    ),
    ("device file", line(8, "target: {device: ./mine.yaml}"), "8:18", ("no such device file: ./mine.yaml",)),
    ("runtime", line(8, "target: {runtime: tensort}"), "8:19", ("'onnxruntime', 'tensorrt' or 'tensorrt-rtx'", "mean 'tensorrt'")),
    ("capability", line(8, "target: {compute_capabilities: [8.9]}"), "8:33", ("target.compute_capabilities.0 must be text", "got 8.9")),
    ("capability text", line(8, "target: {compute_capabilities: [SM89]}"), "8:33", ("such as '8.9'", "'SM89'")),
    ("yes is no truth value", line(8, "target: {memory_tight: yes}"), "8:24", ("must be true or false", "got 'yes'")),
    ("value on the next line", line(4, "inputs:\n  text_tokens: -3\n  new_tokens: 1"), "5:16", ("inputs.text_tokens must be at least 1",)),
    ("duplicate key", GOOD + "name: again\n", "9:1", ("duplicate key 'name'", ":2:1")),
    ("duplicate option", line(6, "  - {at: projector, method: pool, kernel: 2, kernel: 3}"), "6:46", ("duplicate key 'kernel'",)),
    ("tab", line(6, "\t- {at: decoder.2}"), "6:1", ("not valid YAML", "spaces, not tabs")),
    ("open bracket", line(4, "inputs: {text_tokens: 3"), "5:9", ("not valid YAML",)),
    ("colon in text", line(2, "name: a: b"), "2:8", ("not valid YAML", "quotes")),
    ("two documents", GOOD + "---\nrecipe: 1\n", "9:1", ("second document",)),
    ("anchor", line(3, "model: &m {source: a}"), "3:8", ("anchors and aliases", "&m")),
    ("merge key", line(3, "model: {<<: {a: 1}}"), "3:9", ("merge keys",)),
    ("python tag", line(3, "model: !!python/object/apply:os.system [id]"), "3:8", ("tags are not used",)),
    ("own tag", line(2, "name: !env HOME"), "2:7", ("tags are not used", "!env")),
    ("not a number", line(6, "  - {at: projector, method: pool, kernel: .nan}"), "6:43", ("finite",)),
    ("line end in a key", line(3, '"mo\\ndel": {source: a}'), "3:1", (r"unknown key 'mo\ndel'", "mean 'model'")),
    ("line end in a duplicate key", 'recipe: 1\n"a\\nb": 1\n"a\\nb": 2\n', "3:1", (r"duplicate key 'a\nb'",)),
    ("number as key", line(6, "  - {at: projector, 7: pool}"), "6:21", ("a key must be text", "'7'")),
    ("control character", line(2, "name: a\x01b"), "2:8", ("not valid YAML",)),
    ("nested without end", line(2, "name: " + "[" * 3000), "", ("nested too deeply",)),
    ("top level list", "- recipe: 1\n", "1:1", ("a recipe is a mapping", "got a list")),
    ("top level text", "hello\n", "1:1", ("a recipe is a mapping", "got text")),
    ("empty", "", "", ("the file is empty", "recipe: 1")),
    ("comments only", "# a\n\n", "", ("the file is empty",)),
]


def test_the_good_recipe_is_good(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD, encoding="utf-8")
    assert load_recipe(file).name == "good"


@pytest.mark.parametrize(("text", "place", "parts"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
def test_wrong_recipe(text: str, place: str, parts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("wrong.yaml")
    prefix = f"wrong.yaml:{place}: " if place else "wrong.yaml: "
    lines = [line for line in str(caught.value).splitlines() if line.startswith(prefix)]
    assert lines, str(caught.value)
    assert any(all(part in line for part in parts) for line in lines), str(caught.value)
    assert caught.value.exit_code == 2


def test_there_are_many_wrong_recipes() -> None:
    assert len(WRONG) >= 30
    assert len({case[0] for case in WRONG}) == len(WRONG)


def test_all_problems_are_listed_in_the_order_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = line(8, "target: {devic: cpu}").replace("images: 1", "images: -1").replace("float16", "half")
    Path("wrong.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("wrong.yaml")
    assert [problem.split(" ", 1)[0] for problem in str(caught.value).splitlines()] == [
        "wrong.yaml:3:36:",
        "wrong.yaml:4:18:",
        "wrong.yaml:8:10:",
    ]


def test_places_beyond_line_nine_sort_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(GOOD + "\n\nlast: 1\n" + "b: 1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"(?s)wrong\.yaml:11:1: .*wrong\.yaml:12:1: "):
        load_recipe("wrong.yaml")


def test_files_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.yaml").write_bytes("recipe: 1\nname: caf\xe9\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"^latin\.yaml:2:10: byte 0xe9 is not UTF-8"):
        load_recipe("latin.yaml")
    Path("large.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(RecipeError, match=r"^large\.yaml: is too large"):
        load_recipe("large.yaml")


def test_paths_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path, expected in [
        ("none.yaml", r"^none\.yaml: no such recipe file"),
        ("./folder", r"^folder: is a folder"),
        ("folder", r"^folder: is a folder"),
        ("a" * 5000 + ".yaml", r"cannot read the recipe"),
        ("quickstrat", r"no recipe is named 'quickstrat'; did you mean 'quickstart'"),
        ("", r"no recipe is named ''"),
    ]:
        with pytest.raises(RecipeError, match=expected) as caught:
            load_recipe(path)
        assert len(str(caught.value).splitlines()) == 1
