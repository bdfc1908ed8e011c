"""Pictures: equal to transformers' own PIL processors, pixel by pixel; odd inputs either work or say why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tmc_export.core.errors import ModelError, RuntimeInputError
from tmc_export.core.image_rule import ImageRule
from tmc_export.runtime import _images
from tmc_export.runtime._images import choose_bucket, load_image, prepare

skimage_data = pytest.importorskip("skimage.data")
transformers = pytest.importorskip("transformers")

# float32 of values around 1: the same operations in the same order, so that in truth the difference is zero.
TOLERANCE = 1e-6
SIZES = [(1, 1), (1, 40), (700, 3), (5, 9), (300, 451), (512, 512), (336, 335), (224, 224)]


def picture(height: int, width: int, name: str = "astronaut") -> Image.Image:
    """A photograph cut or stretched to a size."""
    return Image.fromarray(getattr(skimage_data, name)()).resize((width, height))


def processor_pixels(processor: Any, image: Any, **options: Any) -> np.ndarray:
    return np.asarray(processor(image, return_tensors="np", **options)["pixel_values"])


def rule_of(processor: Any, height: int, width: int, **options: Any) -> ImageRule:
    return ImageRule.from_processor(processor.to_dict(), height=height, width=width, **options)


def same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def clip(edge: int, **options: Any) -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": edge}, **{"crop_size": {"height": 56, "width": 56}, **options})


PROCESSORS: dict[str, Callable[[], Any]] = {
    "clip": lambda: clip(56),
    "clip-zoom": lambda: clip(64),
    "clip-too-small": lambda: clip(41, crop_size={"height": 56, "width": 57}),
    "clip-odd": lambda: clip(63, crop_size={"height": 51, "width": 48}, resample=2),
    "clip-stretch": lambda: transformers.CLIPImageProcessorPil(size={"height": 56, "width": 56}, crop_size={"height": 56, "width": 56}),
    "clip-raw": lambda: clip(56, do_normalize=False),
    "siglip": lambda: transformers.SiglipImageProcessorPil(size={"height": 48, "width": 64}),
    "llava-pad": lambda: transformers.LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=56, do_pad=True),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_processor(name: str, size: tuple[int, int]) -> None:
    processor = PROCESSORS[name]()
    image = picture(*size)
    theirs = processor_pixels(processor, image)[0]
    rule = rule_of(processor, *theirs.shape[1:])
    same(prepare(load_image(image), rule), theirs)


def test_the_comparison_can_fail() -> None:
    processor = PROCESSORS["clip"]()
    image = picture(300, 451)
    other = image.copy()
    other.putpixel((225, 150), (255, 0, 255))
    with pytest.raises(AssertionError):
        same(prepare(other, rule_of(processor, 56, 56)), processor_pixels(processor, image)[0])


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
@pytest.mark.parametrize("size", [(112, 168), (56, 56), (168, 84)])
def test_qwen_patches_at_the_bucket(name: str, size: tuple[int, int]) -> None:
    processor = transformers.Qwen2VLImageProcessorPil()
    image = picture(*size, name)
    batch = processor(image, return_tensors="np")
    assert batch["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    rule = rule_of(processor, *size)
    assert rule.layout == "patches" and rule.shape == batch["pixel_values"].shape
    same(prepare(image, rule), batch["pixel_values"])


def test_qwen_stretches_like_the_processor_and_in_its_patch_order() -> None:
    processor = transformers.Qwen2VLImageProcessorPil(patch_size=16, temporal_patch_size=3, merge_size=2)
    image = picture(101, 170)
    batch = processor(image, return_tensors="np")
    grid = batch["image_grid_thw"][0]
    rule = rule_of(processor, int(grid[1]) * 16, int(grid[2]) * 16)
    ours = prepare(image, rule)
    same(ours, batch["pixel_values"])
    with pytest.raises(AssertionError):
        same(ours[np.r_[0, 2, 1, 3 : len(ours)]], batch["pixel_values"])


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (96, 200)])
def test_letterbox_centres_in_the_mean_colour(size: tuple[int, int]) -> None:
    rule = ImageRule(60, 100, "letterbox", None, 3, 1 / 255, (0.5, 0.25, 0.75), (1.0, 1.0, 1.0))
    out = prepare(picture(*size), rule)
    assert out.shape == (3, 60, 100)
    corner = np.array([127, 63, 191], dtype=np.float32) / 255 - np.array(rule.mean, dtype=np.float32)
    tall = size[0] * 100 > size[1] * 60
    margins = [out[:, :, 0], out[:, :, -1]] if tall else [out[:, 0], out[:, -1]]
    for margin in margins:
        np.testing.assert_allclose(margin, np.broadcast_to(corner[:, None], margin.shape), atol=1e-6)
    assert np.abs(out[:, 25:35, 45:55] - corner[:, None, None]).max() > 0.1


def test_a_huge_strip_is_cut_without_being_resized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rule_of(PROCESSORS["clip"](), 56, 56)
    strip = picture(30, 1500)
    plain = prepare(strip, rule)
    monkeypatch.setattr(_images, "_LARGEST_RESIZED", 100)
    # Pillow's filters have 8-bit results: one step, where the window's edges round the other way.
    np.testing.assert_allclose(prepare(strip, rule), plain, atol=1.01 / 255 / min(rule.std))
    long = Image.new("RGB", (20_000, 1), (9, 8, 7))
    assert prepare(long, rule).shape == (3, 56, 56)
    with pytest.raises(RuntimeInputError, match="scale it down"):
        prepare(long, rule_of(PROCESSORS["clip"](), 56, 56, fit="letterbox"))


def modes() -> dict[str, Image.Image]:
    photo = picture(60, 90)
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    palette = photo.convert("P")
    clear = palette.copy()
    clear.info["transparency"] = 3
    sixteen = Image.fromarray((np.arange(5400, dtype=np.uint16) * 12).reshape(60, 90))
    return {
        "L": photo.convert("L"), "LA": alpha.convert("LA"), "RGBA": alpha, "P": palette, "P-clear": clear, "1": photo.convert("1"),
        "CMYK": photo.convert("CMYK"), "YCbCr": photo.convert("YCbCr"), "I;16": sixteen,
    }  # fmt: skip


@pytest.mark.parametrize("mode", modes())
def test_modes_equal_the_processor(mode: str, tmp_path: Path) -> None:
    image = modes()[mode]
    processor = PROCESSORS["siglip"]()
    rule = rule_of(processor, 48, 64)
    same(prepare(load_image(image), rule), processor_pixels(processor, image)[0])
    if mode not in ("YCbCr", "CMYK"):  # PNG cannot hold these
        image.save(tmp_path / "picture.png")
        same(prepare(load_image(tmp_path / "picture.png"), rule), processor_pixels(processor, image)[0])


def arrays() -> dict[str, np.ndarray]:
    photo = np.asarray(picture(60, 90))
    alpha = np.dstack([photo, np.linspace(0, 255, 5400).reshape(60, 90).astype(np.uint8)])
    return {
        "uint8": photo,
        "channels-first": np.ascontiguousarray(photo.transpose(2, 0, 1)),
        "one-channel": photo[:, :, :1],
        "alpha": alpha,
        "int64": photo.astype(np.int64),
        "float-255": photo.astype(np.float32),
        "dot": photo[:1, :1],
        "ambiguous": photo[:3, :3],
        "row": photo[:1],
    }


@pytest.mark.parametrize("name", arrays())
def test_arrays_equal_the_processor(name: str) -> None:
    processor = PROCESSORS["siglip"]()
    same(prepare(load_image(arrays()[name]), rule_of(processor, 48, 64)), processor_pixels(processor, arrays()[name])[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [3, 4])
def test_floats_within_one_equal_the_processor_that_does_not_rescale_again(dtype: type, channels: int) -> None:
    values = np.random.default_rng(0).random((60, 90, channels)).astype(dtype)
    processor = PROCESSORS["siglip"]()
    theirs = processor_pixels(processor, values, do_rescale=False)[0]
    ours = prepare(load_image(values), rule_of(processor, 48, 64))
    # half precision is normalised in half precision over there: 11 bits of values up to 1
    np.testing.assert_allclose(ours, theirs.astype(np.float32), rtol=0, atol=2e-3 if theirs.dtype == np.float16 else TOLERANCE)


def test_a_gray_array_is_a_gray_picture() -> None:
    gray = np.asarray(picture(20, 30).convert("L"))
    assert np.array_equal(np.asarray(load_image(gray)), np.repeat(gray[:, :, None], 3, axis=2))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    image = picture(30, 50)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    from transformers.image_utils import load_image as reference

    theirs = np.asarray(reference(str(tmp_path / "turned.png")))
    assert theirs.shape[:2] == ((50, 30) if orientation in (6, 8) else (30, 50))
    assert np.array_equal(np.asarray(load_image(tmp_path / "turned.png")), theirs)
    assert np.array_equal(np.asarray(load_image(Image.open(tmp_path / "turned.png"))), theirs)


def test_wrong_pictures_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not a picture")
    picture(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    cases: list[tuple[Any, str]] = [
        (tmp_path / "none.png", "does not exist; check the path"),
        (tmp_path, "is not a file"),
        (tmp_path / "note.txt", "convert it to PNG or JPEG"),
        (tmp_path / "cut.png", "cannot be read"),
        ("https://example.com/a.png", "download it first"),
        (12, "from int; give a path"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (np.zeros((4, 4, 3), bool), "dtype bool"),
        (np.zeros((5, 5, 2), np.uint8), r"shape \(5, 5, 2\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "1, 3 or 4 channels"),
        (np.full((5, 5, 3), 300, np.uint16), "from 300 to 300"),
        (np.full((5, 5, 3), 1e300), "give 0..255"),
        (np.full((5, 5, 3), 2.5), "within 0..1"),
        (np.full((4, 4, 4), 2.5), "with transparency"),
        (np.full((5, 5, 3), np.nan), "NaN"),
    ]
    for source, message in cases:
        with pytest.raises(RuntimeInputError, match=message) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)


def test_a_rule_without_conversion_refuses_other_modes() -> None:
    rule = rule_of(transformers.SiglipImageProcessorPil(do_convert_rgb=False), 16, 16)
    with pytest.raises(RuntimeInputError, match="mode is L"):
        prepare(picture(9, 9).convert("L"), rule)
    assert prepare(picture(9, 9), rule).shape == (3, 16, 16)


def bucket(height: int, width: int) -> ImageRule:
    return ImageRule(height, width, "resize", None, 3, 1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("size", "index"),
    [((480, 640), 3), ((900, 900), 1), ((100, 100), 0), ((100, 500), 3), ((500, 100), 2), ((158, 158), 0), ((159, 159), 1), ((1, 1), 0)],
)
def test_bucket_of_nearest_aspect_then_area(size: tuple[int, int], index: int) -> None:
    assert choose_bucket(size, [bucket(112, 112), bucket(224, 224), bucket(448, 224), bucket(224, 308), bucket(112, 112)]) == index


def test_no_bucket_and_no_picture_are_refused() -> None:
    with pytest.raises(RuntimeInputError, match="no bucket"):
        choose_bucket((4, 4), [])
    with pytest.raises(RuntimeInputError, match="0 x 4"):
        choose_bucket((0, 4), [bucket(4, 4)])


def test_another_bucket_keeps_the_proportion() -> None:
    zoom = PROCESSORS["clip-zoom"]().to_dict()
    assert ImageRule.from_processor(zoom, height=112, width=112).shortest_edge == 128
    wide = ImageRule.from_processor(zoom, height=56, width=112)
    assert wide.fit == "crop" and wide.shortest_edge is None
    for size in SIZES:
        assert np.all(prepare(Image.new("RGB", size[::-1], (255, 255, 255)), wide) > 0)  # covered: no padding anywhere
    with pytest.raises(ModelError, match="nearest that is: 112x84"):
        ImageRule.from_processor(transformers.Qwen2VLImageProcessorPil().to_dict(), height=113, width=90)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "page", "camera"])
def test_tiny_llava_checkpoint(name: str) -> None:
    folder = Path(__file__).parents[2] / "examples" / "tiny-llava"
    processor = transformers.AutoProcessor.from_pretrained(folder).image_processor
    rule = ImageRule.from_processor(json.loads((folder / "processor_config.json").read_text()), height=112, width=112)
    image = Image.fromarray(getattr(skimage_data, name)())
    same(prepare(load_image(image), rule), processor_pixels(processor, image)[0])
