"""What the benchmarks of weight schemes compare by."""

from __future__ import annotations

import math

import pytest

from benchmarks import schemes_error
from benchmarks._answers import divergence, overlap
from benchmarks.schemes_accuracy import SCHEMES, wants_data
from tmc_export.plan.quantization import needs_calibration
from tmc_export.recipe import QuantizePart


def test_answers_are_compared() -> None:
    base = {"first": [[math.log(0.5), math.log(0.5)], [math.log(0.9), math.log(0.1)]], "kept": [[[1, 2], []], [[3, 4], []]]}
    other = {"first": [[math.log(0.5), math.log(0.5)], [math.log(0.1), math.log(0.9)]], "kept": [[[2, 1], []], [[3, 9], []]]}
    assert divergence(base, base) == (0.0, 1.0) and overlap(base, base) == 1.0
    kl, same = divergence(other, base)
    assert kl == pytest.approx(0.8 * math.log(9) / 2) and same == 0.5
    assert overlap(other, base) == 0.75 and overlap({"kept": [[]]}, {"kept": [[]]}) is None


def test_only_schemes_that_need_data_get_some() -> None:
    wanting = {name for name, quantize in SCHEMES.items() if wants_data(quantize)}
    assert wanting == {"int8-w8a8", "int8-w8a8-smooth", "fp8-w8a8", "int4-awq", "int4-gptq", "int8-slots"}
    assert {n: q for n, q in schemes_error.SCHEMES.items() if n not in SCHEMES} == {"fp8-slots": {"kv": {"weights": "fp8"}}}
    assert SCHEMES.items() <= schemes_error.SCHEMES.items() and wants_data(schemes_error.SCHEMES["fp8-slots"])
    others = [(part, scheme) for name in set(SCHEMES) - wanting for part, scheme in SCHEMES[name].items()]
    assert others and not any(needs_calibration(part, QuantizePart(**scheme)) for part, scheme in others)
