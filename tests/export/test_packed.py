"""Codes that a checkpoint brings: unpacked as their makers pack them, and read as the weights that they stand for.

Expected values are made by `tests/_packed.py`, one code at a time, or written out by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests._packed import AWQ, FORMS, Packed, awq_words, group_of, save_packed, words
from tests.families._small import save_small_llava, save_small_qwen2_vl
from tmc_export.core.errors import ModelError
from tmc_export.export.checkpoint import Checkpoint, open_checkpoint
from tmc_export.export.packed_layouts import AWQ_ORDER, unpack_awq, unpack_words
from tmc_export.export.skeleton import make_skeleton

UP = "language_model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llava(tmp_path_factory.mktemp("packed") / "model", "qwen2", layers=1, vision_layers=2, hidden=64, image_size=42)


@pytest.fixture
def made(model: Path, tmp_path: Path) -> Callable[[str], Packed]:
    return lambda name: save_packed(model, tmp_path, FORMS[name])


def opened(folder: Path) -> Checkpoint:
    from transformers import AutoConfig

    return open_checkpoint(folder, make_skeleton(AutoConfig.from_pretrained(folder), torch.float32, "eager"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------------------------------- layouts
def test_words_by_hand() -> None:
    gptq = np.array([[0x7654_3210, -1], [0x0000_000F, 0x1111_1111]], np.int32)  # two words of input channels, two outputs
    assert unpack_words(gptq, 4, 0)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 15, 0, 0, 0, 0, 0, 0, 0]
    assert unpack_words(gptq, 4, 0)[:, 1].tolist() == [15] * 8 + [1] * 8
    assert unpack_words(gptq, 8, 1)[1].tolist() == [15, 0, 0, 0, 17, 17, 17, 17]
    awq = np.array([[0x7531_6420]], np.int32)  # the lowest four bits are column 0, the next column 2, then 4, 6, 1, 3, 5, 7
    assert unpack_awq(awq).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert unpack_words(awq, 4, 1).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]]  # another order is another matrix


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_words_are_those_that_were_packed(bits: int, axis: int) -> None:
    codes = np.random.default_rng(bits + axis).integers(0, 2**bits, (64, 24)).astype(np.uint8)
    assert np.array_equal(unpack_words(words(codes, bits, axis), bits, axis), codes)
    other = unpack_words(words(codes, bits, axis), bits, 1 - axis)
    assert other.shape != codes.shape or not np.array_equal(other, codes)


def test_awq_is_no_gptq() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (32, 24)).astype(np.uint8)
    assert AWQ == AWQ_ORDER
    assert np.array_equal(unpack_awq(awq_words(codes)), codes)
    assert not np.array_equal(unpack_words(awq_words(codes), 4, 1), codes)
    assert not np.array_equal(unpack_awq(words(codes, 4, 1)), codes)


# ------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("name", FORMS)
def test_weights_are_what_the_codes_stand_for(name: str, made: Callable[[str], Packed]) -> None:
    packed = made(name)
    checkpoint, twin = opened(packed.folder), opened(packed.twin)
    assert len(checkpoint.packed) == len(packed.stored) == 7 and not twin.packed
    assert {m.name for m in checkpoint.packed.values()} == set(packed.stored)
    for state in twin.shapes:
        assert torch.equal(checkpoint.read(state, torch.float32), twin.read(state, torch.float32)), state
        assert checkpoint.identity(state) == twin.identity(state)
    for matrix in checkpoint.packed.values():
        codes, zeros, scales = packed.stored[matrix.name]
        form = FORMS[name]
        middle = 2 ** (form.bits - 1)
        order = matrix.order()
        assert (order is not None) == form.scattered
        if order is not None:  # the first group's channels first, each group's in their own order
            groups = group_of(len(codes), len(scales), True)
            assert order.tolist() == [k for g in range(len(scales)) for k in range(len(codes)) if groups[k] == g]
            codes = codes[order]
        if form.symmetric:
            assert matrix.zero_points() is None
            want = codes if form.fp8 else codes.astype(np.int16) - middle
            assert np.array_equal(matrix.codes().astype(np.float32), want.astype(np.float32))
        else:
            assert np.array_equal(matrix.zero_points(), zeros) and np.array_equal(matrix.codes(), codes)
        assert torch.equal(matrix.scales(torch.float32), scales.float())


def test_zero_points_that_are_all_the_middle_are_none(made: Callable[[str], Packed]) -> None:
    """A format with zero points that has none but the middle becomes signed codes."""
    packed = made("awq")
    key = f"{UP}.qzeros"
    change(packed.folder, lambda t: t.update({key: torch.full_like(t[key], -0x7777_7778)}))  # 0x88888888
    matrices = {m.name: m for m in opened(packed.folder).packed.values()}
    assert matrices[f"{UP}.weight"].zero_points() is None
    assert matrices[f"{UP}.weight"].codes().dtype == np.int8
    assert sum(m.zero_points() is None for m in matrices.values()) == 1


@pytest.mark.parametrize(("name", "wrong"), [("gptq", "gptq_v2"), ("gptq-v2-zero-points", "gptq")])
def test_the_other_gptq_format_is_one_off(name: str, wrong: str, made: Callable[[str], Packed]) -> None:
    """Read as the other format every zero point is one off: refused where it can be seen, and other weights where it cannot."""
    packed = made(name)
    configure(packed.folder, lambda c: c["quantization_config"].update(checkpoint_format=wrong))
    checkpoint = opened(packed.folder)
    state = next(n for n, m in checkpoint.packed.items() if m.name == f"{UP}.weight")
    if name == "gptq":
        with pytest.raises(ModelError, match=r"zero point of 7, .* symmetric, 8; of GPTQ checkpoints, checkpoint_format"):
            checkpoint.read(state, torch.float32)
        return
    codes, zeros, scales = packed.stored[f"{UP}.weight"]
    if (zeros == 15).any():
        with pytest.raises(ModelError, match="zero point of 16"):
            checkpoint.read(state, torch.float32)
        return
    difference = opened(packed.twin).read(state, torch.float32) - checkpoint.read(state, torch.float32)
    assert torch.allclose(difference, scales.float().repeat_interleave(64, 0).T, rtol=1e-4, atol=1e-6)


def test_a_zero_point_that_the_first_format_loses_is_refused(made: Callable[[str], Packed]) -> None:
    packed = made("gptq")
    change(packed.folder, lambda t: t[f"{UP}.qzeros"].fill_(-1))
    with pytest.raises(ModelError, match="zero point of 16, stored as 15"):
        [m.codes() for m in opened(packed.folder).packed.values()]


def test_awq_read_in_another_order_is_another_matrix(made: Callable[[str], Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = made("awq")
    checkpoint, twin = opened(packed.folder), opened(packed.twin)
    state = next(iter(checkpoint.packed))
    assert torch.equal(checkpoint.read(state, torch.float32), twin.read(state, torch.float32))
    monkeypatch.setattr("tmc_export.export.packed.unpack_awq", lambda w: unpack_words(w, 4, 1))
    assert not torch.allclose(checkpoint.read(state, torch.float32), twin.read(state, torch.float32), atol=1e-2)


def test_old_and_new_layouts_and_other_families(tmp_path: Path) -> None:
    """Keys are renamed as plain weights are: Qwen2-VL's begin with `model.` in the hub's first checkpoints."""
    for flat in (False, True):
        model = save_small_qwen2_vl(tmp_path / f"model-{flat}", layers=1, vision_layers=1, flat=flat)
        packed = save_packed(model, tmp_path / f"made-{flat}", FORMS["awq"])
        checkpoint, twin = opened(packed.folder), opened(packed.twin)
        assert len(checkpoint.packed) == 7
        assert all(torch.equal(checkpoint.read(n, torch.float32), twin.read(n, torch.float32)) for n in twin.shapes)


def test_shards(made: Callable[[str], Packed]) -> None:
    """The tensors of one linear may lie in several files."""
    packed = made("gptq")
    tensors = load_file(packed.folder / "model.safetensors")
    (packed.folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    names = sorted(tensors)
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i::3]}, packed.folder / file)
    index = {"metadata": {}, "weight_map": {n: files[names.index(n) % 3] for n in names}}
    (packed.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint, twin = opened(packed.folder), opened(packed.twin)
    assert len({path for m in checkpoint.packed.values() for path, _ in m.places.values()}) == 3
    assert all(torch.equal(checkpoint.read(n, torch.float32), twin.read(n, torch.float32)) for n in twin.shapes)


def test_float16_weights_and_scales(made: Callable[[str], Packed]) -> None:
    packed = made("packed")
    checkpoint, twin = opened(packed.folder), opened(packed.twin)
    for state, matrix in checkpoint.packed.items():
        assert torch.equal(checkpoint.read(state, torch.float16), twin.read(state, torch.float32).half())
        assert torch.equal(matrix.scales(torch.float16).float(), matrix.scales(torch.float32))  # 8 digits fit
    change(packed.folder, lambda t: t[f"{UP}.weight_scale"].mul_(1e-6))
    matrix = next(m for m in opened(packed.folder).packed.values() if m.name == f"{UP}.weight")
    assert float(matrix.scales(torch.float32).abs().max()) > 0
    with pytest.raises(ModelError, match=r"scales of .* are not numbers that torch.float16 holds; build with model.dtype: float32"):
        matrix.scales(torch.float16)


# ------------------------------------------------------------------------------------------------------------ mistakes
def drop(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda t: t.pop(key)


BROKEN: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no scales": ("gptq", drop(f"{UP}.scales"), "stored as codes and lacks its scales"),
    "no codes": ("awq", drop(f"{UP}.qweight"), "stored as codes and lacks its qweight"),
    "no zero points": ("packed-zero-points", drop(f"{UP}.weight_zero_point"), "lacks its weight_zero_point"),
    "fewer rows": ("gptq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:4].clone()}), r"has shape \[4, 128\], int4"),
    "fewer scales": ("gptq", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()}), r"has shape \[1, 128\], int4"),
    "wide codes": ("gptq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].long()}), "holds I64, int4 .* has I32"),
    "scales that are codes": ("awq", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()}), "holds I32"),
    "plain weights with scales": ("int8", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}), "holds F32, int8 .* has I8"),
    "scattered groups": ("gptq", lambda t: t[f"{UP}.g_idx"].copy_(t[f"{UP}.g_idx"].flip(0)), "scattered over its input channels"),
    "other groups": ("gptq-act-order", lambda t: t[f"{UP}.g_idx"].copy_(t[f"{UP}.g_idx"].clamp(max=0)), "are not 2 of 32 input channels"),
    "a bias from nowhere": ("gptq", lambda t: t.update({f"{UP}.bias": torch.ones(128)}), "is not zero, and the model has no such bias"),
    "codes without scales": ("int8", drop(f"{UP}.weight_scale"), r"holds codes \(I8\), and nothing says what they stand for"),
    "scales of an activation": ("awq", lambda t: t.update({f"{UP[:-7]}act.scales": torch.ones(1, 64)}), "goes with no linear of the model"),
    "codes and weights": ("gptq", lambda t: t.update({f"{UP}.weight": torch.ones(128, 64)}), "do not stand for one matrix of the model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_checkpoint_is_refused_when_it_is_opened(case: str, made: Callable[[str], Packed]) -> None:
    name, edit, says = BROKEN[case]
    packed = made(name)
    opened(packed.folder)
    change(packed.folder, edit)
    with pytest.raises(ModelError, match=says) as caught:
        opened(packed.folder)
    assert "\n" not in str(caught.value)


def test_a_bias_of_zeros_is_none(made: Callable[[str], Packed]) -> None:
    """AutoGPTQ writes one for every linear."""
    packed = made("gptq")
    change(packed.folder, lambda t: t.update({f"{UP}.bias": torch.zeros(128)}))
    assert len(opened(packed.folder).packed) == 7


@pytest.mark.parametrize("name", ["gptq", "packed"])
def test_codes_that_config_json_does_not_mention_are_named(name: str, made: Callable[[str], Packed]) -> None:
    packed = made(name)
    configure(packed.folder, lambda c: c.pop("quantization_config"))
    with pytest.raises(ModelError, match="it holds codes .* config.json has no quantization_config"):
        opened(packed.folder)


def test_bare_codes_are_never_taken_for_weights(made: Callable[[str], Packed]) -> None:
    packed = made("fp8")
    configure(packed.folder, lambda c: c.pop("quantization_config"))
    with pytest.raises(ModelError, match=r"holds codes \(F8_E4M3\), and nothing says what they stand for"):
        opened(packed.folder)


def test_a_text_tower_of_codes_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from tmc_export.export.text_tower import open_tower

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    config = CLIPTextConfig(**sizes, projection_dim=32)
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path)
    open_tower(tmp_path, 0, torch.float32)
    key = "text_model.encoder.layers.0.mlp.fc1"
    weight = load_file(tmp_path / "model.safetensors")[f"{key}.weight"].numpy()
    codes, zeros, scales = FORMS["gptq"].quantize(weight)
    tensors = FORMS["gptq"].pack(codes, zeros, scales)
    change(tmp_path, drop(f"{key}.weight"))
    change(tmp_path, lambda t: t.update({f"{key}.{p}": torch.as_tensor(v).contiguous() for p, v in tensors.items()}))
    configure(tmp_path, lambda c: c.update(quantization_config=dict(FORMS["gptq"].config)))
    with pytest.raises(ModelError, match="text tower's weights are stored as codes"):
        open_tower(tmp_path, 0, torch.float32)
