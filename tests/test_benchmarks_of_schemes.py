"""What the benchmarks of weight schemes compare by."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import schemes_error
from benchmarks._answers import ask, divergence, overlap
from benchmarks.schemes_accuracy import SCHEMES, wants_data
from tests._tiny import RECIPE, save_tiny_model, write_recipe
from tmc_export.api import build
from tmc_export.plan.quantization import needs_calibration
from tmc_export.recipe import QuantizePart
from tmc_export.runtime.session import load


def test_answers_are_compared() -> None:
    base = {"first": [[math.log(0.5), math.log(0.5)], [math.log(0.9), math.log(0.1)]], "kept": [[[1, 2], []], [[3, 4], []]]}
    other = {"first": [[math.log(0.5), math.log(0.5)], [math.log(0.1), math.log(0.9)]], "kept": [[[2, 1], []], [[3, 9], []]]}
    assert divergence(base, base) == (0.0, 1.0) and overlap(base, base) == 1.0
    kl, same = divergence(other, base)
    assert kl == pytest.approx(0.8 * math.log(9) / 2) and same == 0.5
    assert overlap(other, base) == 0.75 and overlap({"kept": [[]]}, {"kept": [[]]}) is None


def test_a_bundle_is_asked_as_its_session_answers(tmp_path: Path) -> None:
    """`ask` listens to each prompt and each step of a session; the answers stay what they are."""
    save_tiny_model(tmp_path / "model")
    bundle = build(write_recipe(tmp_path, RECIPE), tmp_path / "bundle", record=False, engines=False).folder
    rng = np.random.default_rng(0)
    asked = [(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), text) for text in ("what is it", "how many")]
    found, session = ask(bundle, asked), load(bundle, threads=1)
    for number, (picture, text) in enumerate(asked):
        answer = session.generate([picture], text)
        assert found["texts"][number] == " ".join(answer.text.split()) and len(answer.tokens) > 1
        assert [len(stage) for stage in found["kept"][number]] == [4]
        assert math.fsum(map(math.exp, found["first"][number])) == pytest.approx(1, abs=1e-2) and 0 <= found["leads"][number] < 2
    assert found["first"][0] != found["first"][1]


def test_only_schemes_that_need_data_get_some() -> None:
    wanting = {name for name, quantize in SCHEMES.items() if wants_data(quantize)}
    assert wanting == {"int8-w8a8", "int8-w8a8-smooth", "fp8-w8a8", "int4-awq", "int4-gptq", "int8-slots"}
    assert {n: q for n, q in schemes_error.SCHEMES.items() if n not in SCHEMES} == {"fp8-slots": {"kv": {"weights": "fp8"}}}
    assert SCHEMES.items() <= schemes_error.SCHEMES.items() and wants_data(schemes_error.SCHEMES["fp8-slots"])
    others = [(part, scheme) for name in set(SCHEMES) - wanting for part, scheme in SCHEMES[name].items()]
    assert others and not any(needs_calibration(part, QuantizePart(**scheme)) for part, scheme in others)
