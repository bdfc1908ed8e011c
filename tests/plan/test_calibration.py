"""Schemes that are found on data, and data that no scheme asks for: refused at their lines, also while such schemes are not built."""

from __future__ import annotations

import pytest

from tests.plan.conftest import Writer
from tmc_export.core.errors import LegalityError
from tmc_export.plan.quantization import check_calibration

DATA = "calibration: {images: a, prompts: b.jsonl}"


@pytest.mark.parametrize(
    ("part", "place", "says"),
    [
        ("decoder: {weights: int8, activations: int8}", "5:50", "quantize.decoder.activations: int8 is found on data"),
        ("decoder: {weights: int4, block: 64, algorithm: gptq}", "5:59", "quantize.decoder.algorithm: gptq is found on data"),
        ("kv: {weights: fp8}", "5:26", "quantize.kv.weights: fp8 is found on data"),
        ("encoder: {weights: nvfp4, activations: nvfp4}", "5:51", "quantize.encoder.activations: nvfp4 is found on data"),
    ],
)
def test_a_scheme_without_its_data(part: str, place: str, says: str, write: Writer) -> None:
    recipe = write(quantize=f"{{{part}}}")
    with pytest.raises(LegalityError, match=says) as caught:
        check_calibration(recipe)
    assert str(caught.value).startswith(f"{recipe.origin().file}:{place}: ") and "add quantize.calibration" in str(caught.value)
    check_calibration(write(quantize=f"{{{part}, {DATA}}}"))


@pytest.mark.parametrize("parts", ["", "decoder: {weights: int8}, ", "kv: {weights: fp16}, ", "head: {weights: fp8}, "])
def test_data_without_a_scheme(parts: str, write: Writer) -> None:
    with pytest.raises(LegalityError, match="has nothing to calibrate"):
        check_calibration(write(quantize=f"{{{parts}{DATA}}}"))


@pytest.mark.parametrize("codes", ["fp8", "nvfp4"])
@pytest.mark.parametrize("observer", ["entropy", "mse"])
def test_observers_of_equal_steps_are_not_for_floating_point(observer: str, codes: str, write: Writer) -> None:
    data = f"calibration: {{images: a, prompts: b.jsonl, observer: {observer}}}"
    says = rf":5:\d+: observer: {observer} reckons with equal steps, and the {codes} activations.*minmax or percentile"
    with pytest.raises(LegalityError, match=says):
        check_calibration(write(quantize=f"{{decoder: {{weights: {codes}, activations: {codes}}}, {data}}}"))
    check_calibration(write(quantize=f"{{decoder: {{weights: int8, activations: int8}}, {data}}}"))


def test_pictures_are_asked_for_where_there_are_any(write: Writer) -> None:
    part = "decoder: {weights: int8, activations: int8}"
    blind = {"inputs": "images: 0, text_tokens: 8, new_tokens: 8"}
    with pytest.raises(LegalityError, match="lacks images, and inputs.images is 1"):
        check_calibration(write(quantize=f"{{{part}, calibration: {{prompts: b.jsonl}}}}"))
    with pytest.raises(LegalityError, match="calibration.images has nothing to act on"):
        check_calibration(write(quantize=f"{{{part}, {DATA}}}", **blind))
    check_calibration(write(quantize=f"{{{part}, calibration: {{prompts: b.jsonl}}}}", **blind))


def test_the_percentile_has_a_default_of_its_observer_alone(write: Writer) -> None:
    given = write(quantize="{calibration: {prompts: b.jsonl, observer: percentile}}").quantize.calibration
    assert given is not None and given.percentile is None and given.percentile_used == 99.99 and given.samples == 32
    set_ = write(quantize="{calibration: {prompts: b.jsonl, observer: percentile, percentile: 99.9}}").quantize.calibration
    assert set_ is not None and set_.percentile_used == 99.9
