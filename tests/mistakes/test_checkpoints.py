"""Damaged checkpoints: one line that names the file or tensor, exit code 2, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests._tiny import TEXT_ONLY, listing, tmc, write_recipe

HEAD = "language_model.lm_head.weight"


def weights(place: Path) -> Path:
    return place / "model" / "model.safetensors"


def change(place: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the weights again after `edit` has changed the mapping."""
    tensors = load_file(weights(place))
    edit(tensors)
    save_file(tensors, weights(place))


def shard(place: Path, parts: int = 3) -> list[Path]:
    """Turn the single file into shards with an index."""
    tensors = load_file(weights(place))
    names = sorted(tensors)
    files = [weights(place).with_name(f"model-{i + 1:05}-of-{parts:05}.safetensors") for i in range(parts)]
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i::parts]}, file)
    index = {"metadata": {}, "weight_map": {n: files[names.index(n) % parts].name for n in names}}
    weights(place).with_name("model.safetensors.index.json").write_text(json.dumps(index))
    weights(place).unlink()
    return files


def refused(place: Path, *says: str, recipe: str = "", code: int = 2) -> None:
    """Build and expect one error line, and the folder as it was."""
    if recipe:
        write_recipe(place, recipe)
    before = listing(place)
    ran = tmc("build", place / "recipe.yaml", "-o", place / "out", "-q")
    error = ran.error()
    assert ran.code == code, error
    assert all(part in error for part in says), error
    assert listing(place) == before


def test_truncated(place: Path) -> None:
    data = weights(place).read_bytes()
    weights(place).write_bytes(data[: len(data) // 2])
    refused(place, "model.safetensors", "damaged or incomplete", "fetch it again")


@pytest.mark.parametrize("length", [0, 4, 8, 100])
def test_cut_in_the_header(place: Path, length: int) -> None:
    weights(place).write_bytes(weights(place).read_bytes()[:length])
    refused(place, "model.safetensors", "damaged or incomplete")


def test_garbage_header(place: Path) -> None:
    data = bytearray(weights(place).read_bytes())
    data[8:40] = b"\xff" * 32
    weights(place).write_bytes(data)
    refused(place, "model.safetensors", "damaged or incomplete")


@pytest.mark.parametrize("byte", [0, 3, 7])
def test_flipped_bit_in_the_header_length(place: Path, byte: int) -> None:
    data = bytearray(weights(place).read_bytes())
    data[byte] ^= 0x40
    weights(place).write_bytes(data)
    refused(place, "model.safetensors", "damaged or incomplete")


def test_html_instead_of_weights(place: Path) -> None:
    weights(place).write_text("<html>404: Not Found</html>" * 10)
    refused(place, "model.safetensors", "damaged or incomplete")


def test_git_lfs_pointer(place: Path) -> None:
    weights(place).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    refused(place, "model.safetensors", "damaged or incomplete")


def test_no_weights(place: Path) -> None:
    weights(place).unlink()
    refused(place, "no model.safetensors")


def test_pickle_only(place: Path) -> None:
    weights(place).rename(place / "model" / "pytorch_model.bin")
    refused(place, "pytorch_model.bin", "never loaded", "convert it to safetensors")


def test_missing_tensor(place: Path) -> None:
    change(place, lambda t: t.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    refused(place, "lacks 1 tensors", "up_proj", "incomplete or of another model")


def test_tensor_of_another_shape(place: Path) -> None:
    change(place, lambda t: t.update({HEAD: t[HEAD][:-1].contiguous()}))
    refused(place, HEAD, "[319, 32]", "[320, 32]", "do not belong together")


def test_missing_shard(place: Path) -> None:
    shard(place)[1].unlink()
    refused(place, "1 of 3 weight shards are missing", "model-00002-of-00003.safetensors")


def test_truncated_shard(place: Path) -> None:
    file = shard(place)[2]
    file.write_bytes(file.read_bytes()[:-10])
    refused(place, "model-00003-of-00003.safetensors", "damaged or incomplete")


def test_shard_without_its_tensor(place: Path) -> None:
    files = shard(place)
    tensors = load_file(files[0])
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, files[0])
    refused(place, "model-00001-of-00003.safetensors", gone, "the index puts there")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '"text"'])
def test_garbage_index(place: Path, text: str) -> None:
    shard(place)
    (place / "model" / "model.safetensors.index.json").write_text(text)
    refused(place, "model")


def test_index_that_leaves_the_folder(place: Path) -> None:
    shard(place)
    index = place / "model" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    (place / "model-00001-of-00003.safetensors").write_bytes(b"not to be read")
    ran = tmc("build", write_recipe(place, TEXT_ONLY), "-o", place / "out", "-q", "--no-record")
    assert ran.code == 0, ran.err  # the shard inside the folder is taken, the one outside never


def test_value_above_float16(place: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[HEAD].to(torch.bfloat16)
        tensors[HEAD][3, 5] = 70000.0

    change(place, edit)
    refused(place, "lm_head.weight", "float16", "65504", recipe=TEXT_ONLY.replace("float32", "float16"))


def test_not_a_number(place: Path) -> None:
    change(place, lambda t: t[HEAD].__setitem__((3, 5), float("nan")))
    refused(place, "lm_head.weight", "nan", recipe=TEXT_ONLY.replace("float32", "float16"))


def test_tokenizer(place: Path) -> None:
    tokenizer = place / "model" / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text[:100])
    refused(place, "tokenizer.json", "fetch")
    tokenizer.unlink()
    refused(place, "tokenizer.json", "does not exist")
    tokenizer.write_text(text)
    (place / "model" / "tokenizer_config.json").write_text("[")
    refused(place, "tokenizer_config.json", "JSON")


def test_chat_template(place: Path) -> None:
    template = place / "model" / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }")
    refused(place, "chat template", "not valid", "chat_template.jinja")
    template.write_bytes(b"\xff\xfe\x00broken")
    refused(place, "chat template", "UTF-8")


def test_processor(place: Path) -> None:
    processor = place / "model" / "processor_config.json"
    for text in ("", "[]", "nonsense"):
        processor.write_text(text)
        refused(place, "processor_config.json")


def test_config_of_another_size(place: Path) -> None:
    config = place / "model" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    refused(place, "do not belong together", "48")
