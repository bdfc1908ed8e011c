"""Recipes that are right: values, places, overrides, the shipped files, hashing and the schema."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tmc_export.core.errors import RecipeError
from tmc_export.recipe import Recipe, find_recipe, load_recipe, recipe_schema, recipes

ROOT = Path(__file__).resolve().parents[2]
TEXT = """\
# a comment
recipe: 1
name: places
model:
  source: ./checkpoint
inputs: {text_tokens: 32, new_tokens: 16, image_size: [[336, 448], [448, 336]]}
compress:
  - at: decoder.2
    method: fastv
    keep: 50%
    layers: [1, 2]
    other: null
  - {at: projector, method: pool}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(TEXT, encoding="utf-8")
    return "x.yaml"


def test_values_and_defaults(file: str) -> None:
    recipe = load_recipe(file)
    assert recipe.inputs.buckets == ((336, 448), (448, 336))
    assert (recipe.inputs.images, recipe.inputs.chunk, recipe.inputs.batch, recipe.inputs.turns) == (1, 64, 1, "freeze")
    assert (recipe.model.dtype, recipe.target.device, recipe.target.runtime) == ("float16", "cpu", "onnxruntime")
    assert dict(recipe.compress[0].options) == {"keep": "50%", "layers": [1, 2], "other": None}
    assert recipe.compress[1].options == {} and recipe.compress[1].scope == "image"
    assert recipe.quantize.decoder is None
    assert load_recipe(file, ["inputs.image_size=[112, 96]"]).inputs.buckets == ((112, 96),)
    assert load_recipe(file, ["inputs.image_size=null"]).inputs.buckets == ()


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), "x.yaml:2:1"),
        (("name",), "x.yaml:3:7"),
        (("model",), "x.yaml:4:1"),  # its value starts on the next line: the key
        (("model", "dtype"), "x.yaml:4:1"),  # a default: what would hold it
        (("inputs", "image_size", 1, 0), "x.yaml:6:69"),
        (("compress", 0), "x.yaml:8:5"),
        (("compress", 0, "keep"), "x.yaml:10:11"),
        (("compress", 0, "layers", 1), "x.yaml:11:17"),
        (("compress", 1, "method"), "x.yaml:13:29"),
        (("compress", 1, "keep"), "x.yaml:13:5"),
        (("target", "device"), "x.yaml:2:1"),
    ],
)
def test_places(file: str, path: tuple[str | int, ...], place: str) -> None:
    assert str(load_recipe(file).origin(path)) == place


def test_overrides(file: str) -> None:
    recipe = load_recipe(
        file,
        [
            "compress.0.keep=25%",
            "inputs.images=2",
            "quantize.decoder={weights: int4, block: 32}",
            "compress.2.at=encoder",
            "compress.2.method=tome",
        ],
    )
    assert recipe.compress[0].options["keep"] == "25%" and recipe.inputs.images == 2
    assert recipe.quantize.decoder is not None and recipe.quantize.decoder.block == 32
    assert [entry.method for entry in recipe.compress] == ["fastv", "pool", "tome"]
    assert str(recipe.origin(("compress", 0, "keep"))) == "--set compress.0.keep=25%"
    assert str(recipe.origin(("quantize", "decoder", "block"))) == "--set quantize.decoder={weights: int4, block: 32}"
    assert str(recipe.origin(("compress", 0, "method"))) == "x.yaml:9:13"
    assert load_recipe(file, ["compress=[]"]).compress == ()
    assert load_recipe(file, ["inputs.images=2", "inputs.images=3"]).inputs.images == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inputs.images", r"^--set inputs\.images: write it as key=value"),
        ("=1", r"^--set =1: write it as key=value"),
        ("inputs..images=1", r"write it as key=value"),
        ("inputs.images=two", r"^--set inputs\.images=two: inputs\.images must be a whole number, got 'two'$"),
        ("inputs.imges=2", r"^--set inputs\.imges=2: unknown key 'imges' in inputs; did you mean 'images'"),
        ("compress.5.keep=1", r"compress is a list of 2; use a number from 0 to 2, got '5'$"),
        ("compress.keep=1", r"compress is a list of 2; .* got 'keep'$"),
        ("name.x=1", r"name is 'places' and holds no key 'x'$"),
        ("name=[", r"^--set name=\[:1:2: not valid YAML"),
        ("recipe=2", r"^--set recipe=2: recipe schema 2 is newer"),
        (
            "target.device=rtx-4091",
            r"^--set target\.device=rtx-4091: target\.device: no device is named 'rtx-4091'; did you mean 'rtx-4090'",
        ),
    ],
)
def test_wrong_overrides(file: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(file, [override])


def test_canonical_json_depends_on_what_is_said_only(file: str) -> None:
    first = load_recipe(file).canonical_json()
    Path("y.yaml").write_text(TEXT.replace("  source", "  dtype: float16\n  source").replace("# a comment", ""), encoding="utf-8")
    assert load_recipe("y.yaml").canonical_json() == first
    assert load_recipe(file, ["compress.0.keep=51%"]).canonical_json() != first
    assert Recipe.model_validate_json(first).canonical_json() == first
    assert str(Path.cwd()) not in first


def test_a_recipe_is_frozen(file: str) -> None:
    recipe = load_recipe(file)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        recipe.compress[0].options["keep"] = 1  # type: ignore[index]


def test_the_model_folder(file: str) -> None:
    assert load_recipe(file).model_folder() == Path.cwd() / "checkpoint"
    assert load_recipe(file, ["model.source=llava-hf/llava-1.5-7b-hf"]).model_folder() is None
    Path("here").mkdir()
    assert load_recipe(file, ["model.source=here"]).model_folder() == Path.cwd() / "here"
    assert load_recipe(file, [f"model.source={Path.cwd()}"]).model_folder() == Path.cwd()


def test_learned_weights_are_found_as_model_folders_are(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "compress.1.weights={file: ../w.safetensors, prefix: mm.}"
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(tmp_path / file, [said])
    assert recipe.weights_file(0) is None and recipe.weights_file(1) == tmp_path.parent / "w.safetensors"
    assert recipe.moved_to(ROOT / "recipes").weights_file(1) == ROOT / "w.safetensors"
    assert (
        load_recipe(tmp_path / file, [f"compress.1.weights={{file: {tmp_path}/w.safetensors}}"]).weights_file(1)
        == tmp_path / "w.safetensors"
    )
    random = load_recipe(tmp_path / file, ["compress.1.weights={random: 3}"])
    assert random.weights_file(1) is None and random.compress[1].weights is not None and random.compress[1].weights.random == 3
    assert Recipe.model_validate_json(random.canonical_json()).canonical_json() == random.canonical_json()


def test_a_device_file_is_relative_to_the_recipe(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("mine.yaml").write_text((ROOT / "devices" / "cpu.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(ROOT)
    assert load_recipe(tmp_path / file, ["target.device=./mine.yaml"]).target.device == "./mine.yaml"


def test_windows_line_ends_and_a_byte_order_mark(file: str) -> None:
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert load_recipe("bom.yaml").canonical_json() == load_recipe(file).canonical_json()


def test_shipped_recipes() -> None:
    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(files) >= 10
    assert recipes() == sorted(file.stem for file in files)
    for path in files:
        recipe = load_recipe(path)
        assert recipe.name == path.stem
        assert path.read_text(encoding="utf-8").startswith(f"# tmc-export build recipes/{path.name} -o out/")
        assert load_recipe(path.stem).canonical_json() == recipe.canonical_json()
        if recipe.model.source.startswith("."):
            assert recipe.model_folder() == ROOT / "examples" / "tiny-llava"


def test_find_recipe() -> None:
    assert find_recipe("quickstart").resolve() == ROOT / "recipes" / "quickstart.yaml"
    assert find_recipe("some/where.yaml") == Path("some/where.yaml")


def test_the_schema_knows_every_key() -> None:
    schema = recipe_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert list(schema["properties"]) == ["recipe", "name", "model", "inputs", "compress", "quantize", "target"]
    assert schema["additionalProperties"] is False
    part = schema["$defs"]["QuantizePart"]["properties"]
    assert list(part) == ["weights", "activations", "block", "algorithm", "smooth", "keep"]
    assert part["weights"]["enum"] == ["fp16", "bf16", "int8", "int4", "fp8", "nvfp4"]
    assert list(schema["$defs"]["Quantize"]["properties"]) == ["encoder", "projector", "decoder", "head", "kv", "calibration"]
    assert list(schema["$defs"]["Calibration"]["properties"]) == ["images", "prompts", "samples", "observer", "percentile"]
    weights = schema["$defs"]["WeightsSource"]
    assert list(weights["properties"]) == ["file", "prefix", "random"] and weights["additionalProperties"] is False
    assert [way["required"] for way in weights["oneOf"]] == [["file"], ["random"]]
    assert set(schema["required"]) == {"recipe", "name", "model", "inputs"}


def test_reading_a_recipe_imports_no_torch() -> None:
    code = "import sys; from tmc_export.recipe import load_recipe; load_recipe('quickstart'); "
    code += "print([name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
