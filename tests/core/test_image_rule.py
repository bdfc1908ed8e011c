"""Image rules: every spelling a checkpoint uses, the JSON round trip, and refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tmc_export.core.errors import ModelError
from tmc_export.core.image_rule import ImageRule

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
QWEN = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}


@pytest.mark.parametrize(
    "config",
    [
        CLIP,
        {"image_processor": CLIP, "processor_class": "LlavaProcessor", "patch_size": 14},
        {**CLIP, "size": 336, "crop_size": 336},
        {**CLIP, "image_processor_type": "CLIPImageProcessorFast", "data_format": "channels_first", "device": None},
        {**CLIP, "image_processor_type": "CLIPImageProcessorPil", "do_pad": None},
        {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": False},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336, "resample": 3},
        {**CLIP, "do_rescale": True, "rescale_factor": 0.00392156862745098, "image_mean": [0.48145466, 0.4578275, 0.40821073]},
    ],
)
def test_every_spelling_of_clip(config: dict[str, Any]) -> None:
    expected = ImageRule(
        336, 336, "crop", 336, 3, 1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )  # fmt: skip
    assert ImageRule.from_processor(config, height=336, width=336) == expected


@pytest.mark.parametrize("config", [CLIP, QWEN, {"image_processor_type": "SiglipImageProcessor"}])
@pytest.mark.parametrize("fit", [None, "crop", "resize", "letterbox"])
def test_json_round_trip(config: dict[str, Any], fit: str | None) -> None:
    rule = ImageRule.from_processor(config, height=112, width=168, fit=fit)
    assert ImageRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule
    assert fit is None or rule.fit == fit


def test_own_fits_and_layouts() -> None:
    qwen = ImageRule.from_processor(QWEN, height=56, width=84)
    assert (qwen.fit, qwen.layout, qwen.shape) == ("resize", "patches", (24, 1176))
    siglip = ImageRule.from_processor({"image_processor_type": "SiglipImageProcessor"}, height=384, width=384)
    assert (siglip.fit, siglip.layout, siglip.mean, siglip.shape) == ("resize", "pixels", (0.5, 0.5, 0.5), (3, 384, 384))
    padded = ImageRule.from_processor({**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}, height=336, width=336)
    assert (padded.fit, padded.shortest_edge) == ("letterbox", None)
    plain = ImageRule.from_processor({**CLIP, "do_rescale": False, "do_normalize": False}, height=336, width=336)
    assert (plain.rescale, plain.mean, plain.std) == (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no image_processor_type"),
        ({"image_processor": 3}, "must be a JSON object"),
        ({"image_processor_type": "PixtralImageProcessor"}, "'PixtralImageProcessor' is not known; known: CLIP"),
        ({**CLIP, "do_image_splitting": True}, "do_image_splitting=True is not known"),
        ({**CLIP, "do_pad": True}, "do_pad is on"),
        ({**CLIP, "do_resize": False}, "do_resize is off"),
        ({**CLIP, "do_center_crop": False}, "pictures of any size"),
        ({**CLIP, "size": {"height": 400, "width": 400}}, "stretch-then-cut"),
        ({**CLIP, "size": {"longest_edge": 336}}, "size is"),
        ({**CLIP, "crop_size": {"shortest_edge": 336}}, "crop_size is"),
        ({**CLIP, "resample": "bicubic"}, "resample is 'bicubic'"),
        ({**CLIP, "resample": 9}, "resample is 9"),
        ({**CLIP, "image_mean": [0.5]}, "image_mean is"),
        ({**CLIP, "image_std": [1, 0, 1]}, "cannot be zero"),
        ({**CLIP, "do_normalize": "yes"}, "do_normalize is 'yes'"),
        ({**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": 400}, "cuts the padded picture"),
        ({**QWEN, "do_center_crop": True}, "do_center_crop is on"),
        ({**QWEN, "patch_size": 15}, "nearest that is: 330x330"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ImageRule.from_processor(config, height=336, width=336)


def test_rules_that_contradict_themselves() -> None:
    good = ImageRule.from_processor(CLIP, height=336, width=336).to_json()
    for change, message in [
        ({"fit": "squeeze"}, "choose one of crop, resize, letterbox"),
        ({"layout": "tiles"}, "choose one of pixels, patches"),
        ({"height": 0}, "height is 0"),
        ({"fit": "resize"}, "only with fit 'crop'"),
        ({"height": 1.5}, "whole number"),
        ({"extra": 1}, r"unknown \['extra'\]"),
    ]:
        with pytest.raises(ModelError, match=message):
            ImageRule.from_json({**good, **change})
    del good["mean"]
    with pytest.raises(ModelError, match=r"missing \['mean'\]"):
        ImageRule.from_json(good)
