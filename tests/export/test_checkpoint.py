"""Checkpoints: shards, renamed keys of older layouts, tied weights, casts. Values are compared with transformers' own loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families._small import save_small_llava, save_small_qwen2_vl
from tmc_export.core.errors import ModelError
from tmc_export.export.checkpoint import Checkpoint, open_checkpoint
from tmc_export.export.skeleton import make_skeleton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def opened(folder: Path) -> tuple[Checkpoint, Any]:
    from transformers import AutoConfig

    model = make_skeleton(AutoConfig.from_pretrained(folder), torch.float32, "eager")
    return open_checkpoint(folder, model), model


def same_as_transformers(folder: Path) -> Checkpoint:
    """Every tensor of the state dict is what `from_pretrained` loads, bit for bit."""
    from transformers import AutoModelForImageTextToText

    checkpoint, skeleton = opened(folder)
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    state = whole.state_dict()
    assert set(checkpoint.shapes) == set(skeleton.state_dict()) == set(state)
    for name, wanted in state.items():
        assert torch.equal(checkpoint.read(name, torch.float32), wanted), name
    assert all(p.is_meta for p in skeleton.parameters())
    return checkpoint


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llava(tmp_path_factory.mktemp("llava"), layers=2, vision_layers=2, hidden=32, image_size=42)


def rewritten(llava: Path, out: Path, rename: dict[str, str], dtype: torch.dtype = torch.float32) -> Path:
    """Copy a model with other tensor names or another dtype; the first prefix that fits is replaced."""
    out.mkdir()
    for path in llava.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    tensors = {}
    for name, tensor in load_file(llava / "model.safetensors").items():
        prefix = next((p for p in rename if name.startswith(p)), "")
        tensors[(rename[prefix] if prefix else "") + name.removeprefix(prefix)] = tensor.to(dtype)
    save_file(tensors, out / "model.safetensors")
    return out


def test_single_file(llava: Path) -> None:
    same_as_transformers(llava)


def test_the_layout_of_the_repository(repository: Path) -> None:
    folder = repository / "examples" / "tiny-llava"
    assert any(k.startswith("language_model.model.layers") for k in load_file(folder / "model.safetensors"))
    same_as_transformers(folder)


def test_the_layout_of_newer_files(llava: Path, tmp_path: Path) -> None:
    new = {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head", "vision_tower.": "model.vision_tower."}
    new["multi_modal_projector."] = "model.multi_modal_projector."
    folder = rewritten(llava, tmp_path / "new", new)
    assert "model.language_model.layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    same_as_transformers(folder)


def test_qwen(tmp_path: Path) -> None:
    same_as_transformers(save_small_qwen2_vl(tmp_path, layers=2, vision_layers=1))


def test_shards(llava: Path, tmp_path: Path) -> None:
    folder = rewritten(llava, tmp_path / "shards", {})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i::3]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {n: files[names.index(n) % 3] for n in names}})
    )
    checkpoint = same_as_transformers(folder)
    assert {path.name for source in checkpoint.sources.values() for path, _ in source.parts} == set(files)


def test_tied_weights_have_one_identity(tmp_path: Path, llava: Path) -> None:
    checkpoint = same_as_transformers(save_small_llava(tmp_path / "tied", layers=1, vision_layers=2, hidden=32, image_size=42, tied=True))
    table = next(n for n in checkpoint.sources if n.endswith("embed_tokens.weight"))
    assert checkpoint.identity("lm_head.weight") == checkpoint.identity(table)
    untied, _ = opened(llava)
    assert untied.identity("lm_head.weight") != untied.identity(table)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_casts(llava: Path, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    checkpoint, _ = opened(rewritten(llava, tmp_path / "cast", {}, stored))
    raw = load_file(tmp_path / "cast" / "model.safetensors")["language_model.lm_head.weight"]
    found = checkpoint.read("lm_head.weight", wanted)
    assert found.dtype == wanted and torch.equal(found, raw.to(wanted))


@pytest.mark.parametrize("value", [65520.0, -70000.0, float("inf"), float("nan")])
def test_overflow_is_an_error_not_an_infinity(llava: Path, tmp_path: Path, value: float) -> None:
    folder = rewritten(llava, tmp_path / "over", {})
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    checkpoint, _ = opened(folder)
    with pytest.raises(ModelError, match=r"'lm_head\.weight' holds .*65504"):
        checkpoint.read("lm_head.weight", torch.float16)
    kept = checkpoint.read("lm_head.weight", torch.float32)[3, 5]
    assert kept == value or value != value
    tensors["language_model.lm_head.weight"][3, 5] = 65504.0
    save_file(tensors, folder / "model.safetensors")
    assert opened(folder)[0].read("lm_head.weight", torch.float16)[3, 5] == 65504.0


def test_opening_reads_no_tensor(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tmc_export.export.checkpoint as module

    def never(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(module, "read_raw", never)
    opened(llava)
