"""Checkpoints that are quantized already, made by hand: the linears of a small model become codes, and a twin holds what they stand for.

Nothing here is shared with what reads them: words are filled one code at a time, and the twin's weights are `(code - zero) * scale`.

Legend: K input channels, N output channels, G groups.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

__all__ = ["FORMS", "Form", "Packed", "awq_words", "group_of", "save_packed", "stands_for", "words"]

Array = NDArray[Any]
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Array, bits: int, axis: int) -> Array:
    """Fill 32-bit words with codes along an axis, the first in the lowest bits; the last word is filled up with zeros."""
    plain = np.moveaxis(codes.astype(np.uint64), axis, 0)
    each = 32 // bits
    filled = np.zeros((-(-len(plain) // each), *plain.shape[1:]), np.uint64)
    for place, row in enumerate(plain):
        filled[place // each] += row << np.uint64(bits * (place % each))
    return np.moveaxis(filled.astype(np.uint32).view(np.int32), 0, axis)


def awq_words(codes: Array) -> Array:
    """AWQ's words: of eight columns, 0 2 4 6 1 3 5 7 lie one above the other."""
    order = [8 * (column // 8) + AWQ[column % 8] for column in range(codes.shape[1])]
    return words(codes[:, order], 4, 1)


def group_of(channels: int, groups: int, scattered: bool) -> Array:
    """Which group each input channel is of `[K]`."""
    plain = np.arange(channels, dtype=np.int32) // (channels // groups)
    return np.random.default_rng(channels).permutation(plain).astype(np.int32) if scattered else plain


def stands_for(codes: Array, zeros: Array, scales: Array, scattered: bool = False) -> Array:
    """The weight `[N, K]` of unsigned codes `[K, N]` (or E4M3 ones), zero points and scales `[G, N]`."""
    groups = group_of(len(codes), len(scales), scattered)
    weight = np.empty(codes.shape, np.float32)
    for channel in range(len(codes)):
        g = groups[channel]
        weight[channel] = (codes[channel].astype(np.float32) - zeros[g].astype(np.float32)) * scales[g].astype(np.float32)
    return np.ascontiguousarray(weight.T)


@dataclass(frozen=True)
class Form:
    """One way to store a linear.

    Attributes:
        config: the `quantization_config`.
        pack: codes `[K, N]`, zero points `[G, N]` and scales `[G, N]` (torch) → tensors by their last name.
        bits: of a code; 8 and `fp8` are E4M3.
        group: input channels; 0: all.
        symmetric: zero points are the middle.
        dtype: of the scales in the file.
        one: a single scale for the matrix.
        scattered: groups are made of input channels in a drawn order, as activation order makes them.
    """

    config: Mapping[str, Any]
    pack: Callable[[Array, Array, torch.Tensor], dict[str, Any]]
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    dtype: torch.dtype = torch.float16
    fp8: bool = False
    one: bool = False
    scattered: bool = False

    def quantize(self, weight: Array) -> tuple[Array, Array, torch.Tensor]:
        """Round a weight `[N, K]`: codes `[K, N]`, zero points and scales `[G, N]`."""
        rows = weight.T
        k, n = rows.shape
        order = np.argsort(group_of(k, k // (self.group or k), self.scattered), kind="stable")
        groups = rows[order].reshape(k // (self.group or k), -1, n)
        top, middle = 2**self.bits - 1, 2 ** (self.bits - 1)
        if self.fp8:
            high = np.abs(groups).max(1) / 448
        elif self.symmetric:
            high = np.abs(groups).max(1) / (middle - 1)
        else:
            high = (np.maximum(groups.max(1), 0) - np.minimum(groups.min(1), 0)) / top
        scales = torch.from_numpy(np.broadcast_to(high.max(), high.shape).copy() if self.one else high).to(self.dtype)
        wide = scales.float().numpy()
        if self.fp8:
            import ml_dtypes

            codes = (groups / wide[:, None]).reshape(k, n).astype(ml_dtypes.float8_e4m3fn)
            return codes, np.zeros_like(wide), scales
        zeros = np.full(wide.shape, middle) if self.symmetric else np.clip(np.rint(-np.minimum(groups.min(1), 0) / wide), 0, top)
        zeros = zeros.astype(np.uint8)
        codes = np.clip(np.rint(groups / wide[:, None]) + zeros[:, None], 0, top).astype(np.uint8).reshape(k, n)
        codes = codes[np.argsort(order)]
        return codes, zeros, scales


def _gptq(bits: int, bias: int, scattered: bool = False) -> Callable[[Array, Array, torch.Tensor], dict[str, Any]]:
    def pack(codes: Array, zeros: Array, scales: torch.Tensor) -> dict[str, Any]:
        order = group_of(len(codes), len(scales), scattered)
        stored = zeros.astype(np.int64) - bias
        return {"qweight": words(codes, bits, 0), "qzeros": words(stored, bits, 1), "scales": scales, "g_idx": order}

    return pack


def _awq(codes: Array, zeros: Array, scales: torch.Tensor) -> dict[str, Any]:
    return {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}


def _packed(bits: int, symmetric: bool = True, scattered: bool = False) -> Callable[[Array, Array, torch.Tensor], dict[str, Any]]:
    def pack(codes: Array, zeros: Array, scales: torch.Tensor) -> dict[str, Any]:
        tensors = {
            "weight_packed": words(codes.T, bits, 1),
            "weight_scale": scales.T.contiguous(),
            "weight_shape": np.array(codes.T.shape, np.int64),
        }
        if scattered:
            tensors["weight_g_idx"] = group_of(len(codes), len(scales), True)
        return tensors if symmetric else tensors | {"weight_zero_point": words(zeros.T, bits, 0)}

    return pack


def _plain(codes: Array, zeros: Array, scales: torch.Tensor) -> dict[str, Any]:
    if codes.dtype != np.uint8:
        stored = torch.from_numpy(np.ascontiguousarray(codes.T).view(np.uint8)).view(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scales.T.contiguous()}
    return {"weight": (codes.T.astype(np.int16) - 128).astype(np.int8), "weight_scale": scales.T.contiguous()}


def _one(codes: Array, zeros: Array, scales: torch.Tensor) -> dict[str, Any]:
    return _plain(codes, zeros, scales) | {"weight_scale": scales[:1, :1].reshape(1).clone()}


def _gptq_config(**options: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01, **options}


def _awq_config(**options: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["visual"],
        **options,
    }  # fmt: skip


def _compressed(form: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    given = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False, **weights}
    ignore = ["lm_head", "re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*visual.*"]
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ignore,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": given, "input_activations": inputs, "output_activations": None}},
    }  # fmt: skip


_CHANNEL = {"strategy": "channel", "group_size": None, "num_bits": 8}
_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}

FORMS: Mapping[str, Form] = {
    "gptq": Form(_gptq_config(), _gptq(4, 1)),
    "gptq-v2-zero-points": Form(_gptq_config(checkpoint_format="gptq_v2", sym=False, group_size=64), _gptq(4, 0), 4, 64, False),
    "gptq-channels": Form(_gptq_config(group_size=-1), _gptq(4, 1), 4, 0),
    "gptq-act-order": Form(_gptq_config(desc_act=True), _gptq(4, 1, True), scattered=True),
    "gptq-8-bits": Form(_gptq_config(bits=8), _gptq(8, 1), 8),
    "awq": Form(_awq_config(), _awq, symmetric=False),
    "awq-64": Form(_awq_config(group_size=64), _awq, 4, 64, False),
    "packed": Form(_compressed("pack-quantized"), _packed(4), dtype=torch.bfloat16),
    "packed-zero-points": Form(
        _compressed("pack-quantized", symmetric=False), _packed(4, False), symmetric=False, dtype=torch.bfloat16
    ),
    "packed-act-order": Form(
        _compressed("pack-quantized", symmetric=False, actorder="group"), _packed(4, False, True), symmetric=False, dtype=torch.bfloat16,
        scattered=True,
    ),
    "packed-8-bits": Form(_compressed("pack-quantized", **_CHANNEL), _packed(8), 8, 0, dtype=torch.bfloat16),
    "int8": Form(_compressed("int-quantized", _TOKENS, **_CHANNEL), _plain, 8, 0, dtype=torch.bfloat16),
    "fp8": Form(_compressed("float-quantized", **_CHANNEL, type="float"), _plain, 8, 0, dtype=torch.bfloat16, fp8=True),
    "fp8-one-scale": Form(
        _compressed("float-quantized", num_bits=8, type="float", strategy="tensor", group_size=None), _one, 8, 0,
        dtype=torch.float32, fp8=True, one=True,
    ),
}  # fmt: skip
"""Every form that is read, as its makers write it."""


@dataclass
class Packed:
    """A folder of codes and its twin of plain weights.

    Attributes:
        folder, twin: the two models.
        stored: linear's name in the file → codes, zero points and scales.
    """

    folder: Path
    twin: Path
    stored: dict[str, tuple[Array, Array, torch.Tensor]] = field(default_factory=dict)


def save_packed(model: Path, folder: Path, form: Form, keep: tuple[str, ...] = ()) -> Packed:
    """Quantize the decoder's linears of a small model.

    Args:
        model: a folder with one safetensors file.
        folder: made; the codes come to `packed`, the twin to `plain`.
        form: how.
        keep: linears whose name holds one of these stay as they are.
    """
    made = Packed(folder / "packed", folder / "plain")
    for out in (made.folder, made.twin):
        shutil.copytree(model, out)
    tensors = load_file(model / "model.safetensors")
    plain = dict(tensors)
    for name in sorted(n for n in tensors if ".layers." in n and n.endswith("_proj.weight") and "vision" not in n and "visual" not in n):
        if any(word in name for word in keep):
            continue
        codes, zeros, scales = form.quantize(tensors.pop(name).numpy())
        made.stored[name] = codes, zeros, scales
        plain[name] = torch.from_numpy(stands_for(codes, zeros, scales.float().numpy(), form.scattered))
        for part, tensor in form.pack(codes, zeros, scales).items():
            stored = tensor if isinstance(tensor, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(tensor))
            tensors[f"{name.removesuffix('weight')}{part}"] = stored.contiguous()
    assert made.stored, "nothing was quantized"
    save_file(tensors, made.folder / "model.safetensors")
    save_file(plain, made.twin / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(form.config)}))
    return made
