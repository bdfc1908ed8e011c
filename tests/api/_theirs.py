"""Hugging Face's model with its linears rounded by what is written here, and what a bundle's session gives beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from tests.api._four_bits import four
from tmc_export.quantize.calibrated import Calibrated
from tmc_export.quantize.nvfp4 import dequantize_nvfp4, global_scale, quantize_nvfp4
from tmc_export.runtime.session import Session, load

__all__ = ["asked", "asked_of", "key", "logits", "sqnr", "theirs", "theirs_in_four"]


def eight(x: torch.Tensor, step: torch.Tensor | float) -> torch.Tensor:
    return (x / step).round().clamp(-128, 127) * step


def fp8(x: torch.Tensor, step: torch.Tensor | float) -> torch.Tensor:
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


ROUNDED = {"int8": (eight, 127), "fp8": (fp8, 448)}


def theirs(home: Path, session: Session, prompt: Any, calibrated: Calibrated, factor: float = 1.0, scheme: str = "int8") -> np.ndarray:
    """Logits of Hugging Face's model with inputs and weights of its linears rounded to 8 bits."""
    rounded, top = ROUNDED[scheme]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(home / "model", dtype=torch.float32).eval()
    changed = set()
    for name, part in model.named_modules():
        same = [n for n in calibrated.clips if isinstance(part, nn.Linear) and key(n) == key(f"{name}.weight")]
        if not same:
            continue
        changed.add(same[0])
        divisor = torch.from_numpy(calibrated.divisors[same[0]]) if same[0] in calibrated.divisors else torch.ones(part.in_features)
        weight = part.weight.data * divisor
        part.weight.data = rounded(weight, weight.abs().amax(1, keepdim=True) / top)
        clip = calibrated.clips[same[0]] * factor
        part.register_forward_pre_hook(lambda _, given, d=divisor, s=clip / top: (rounded(given[0] / d, s),))
    assert changed == calibrated.clips.keys() and len(changed) > 20
    if scheme != "int8":
        return logits(model, prompt)
    patch = next(m for m in model.modules() if isinstance(m, nn.Conv2d))  # int8 stores it, and no input of it is rounded
    step = patch.weight.data.abs().amax((1, 2, 3), keepdim=True) / 127
    patch.weight.data = (patch.weight.data / step).round() * step
    return logits(model, prompt)


def logits(model: Any, prompt: Any) -> np.ndarray:
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(prompt.ids)[None], pixel_values=torch.from_numpy(prompt.pixels[0][1]), logits_to_keep=1)
    return out.logits[0, -1].numpy()


def key(name: str) -> str:
    """A weight's name without what old and new layouts put before it."""
    words = name.split(".")
    return ".".join(w for w in words if w not in ("model", "language_model", "vision_tower", "vision_model"))


def asked_of(home: Path, bundle: Path, int4_accuracy: int = 4) -> tuple[Session, Any, np.ndarray]:
    return asked(home, load(bundle, threads=1, int4_accuracy=int4_accuracy))


def asked(home: Path, session: Session) -> tuple[Session, Any, np.ndarray]:
    prompt = session.prompt([5, 6, session.program.image_token, 7, 9, 11], session.encode_images([str(home / "pictures" / "1.png")]))
    return session, prompt, session.run_prompt(prompt).logits.reshape(-1)


def sqnr(got: np.ndarray, want: np.ndarray) -> float:
    error = np.square(got - want, dtype=np.float64).sum()
    return float(10 * np.log10(np.square(want, dtype=np.float64).sum() / error)) if error else float("inf")


def theirs_in_four(home: Path, prompt: Any, calibrated: Calibrated, factor: float = 1.0) -> np.ndarray:
    """Logits of Hugging Face's model with inputs and weights of its linears in nvfp4; those that read one input share a scale."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(home / "model", dtype=torch.float32).eval()
    parts = {key(f"{n}.weight"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    groups: dict[float, list[Any]] = {}
    for name, clip in calibrated.clips.items():
        groups.setdefault(clip, []).append(parts[key(name)])
    assert sum(map(len, groups.values())) > 20 and max(map(len, groups.values())) == 3
    for clip, members in groups.items():
        scale = global_scale(max(float(m.weight.data.abs().max()) for m in members), np.float32)
        step = float(global_scale(clip * factor, np.float32))
        for part in members:
            weight = np.ascontiguousarray(part.weight.data.numpy().T)
            part.weight.data = torch.from_numpy(dequantize_nvfp4(*quantize_nvfp4(weight, scale), scale).T.copy())
            part.register_forward_pre_hook(lambda _, given, g=step: (four(given[0], g),))
    return logits(model, prompt)
