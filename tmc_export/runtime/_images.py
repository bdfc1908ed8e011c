"""Pictures of any kind into the one static input of a vision graph, without torch or transformers.

A picture is first made upright and RGB (`load_image`), then fitted into its bucket and normalised (`prepare`). Which bucket, where a
bundle has several, says `choose_bucket`: the one rule that runtime and reference share.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tmc_export.core.errors import RuntimeInputError
from tmc_export.core.image_rule import ImageRule

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ImageLike", "choose_bucket", "load_image", "prepare"]

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.generic]"

_LARGEST_CANVAS = 178_956_970  # pixels; beyond this Pillow itself calls a picture a decompression bomb
_LARGEST_RESIZED = 64_000_000  # pixels; beyond this only the part that is kept gets computed


def load_image(source: ImageLike) -> Image.Image:
    """Read a picture and make it upright RGB.

    A file or a PIL picture is turned as its EXIF orientation says; transparency is put over white; palette, gray, CMYK and 16-bit
    pictures are converted by Pillow (which cuts 16-bit values off at 255; scale those down first). Of an animation the first frame is
    taken.

    An array is `[h, w]` gray, or 1, 3 or 4 channels as `[h, w, c]` or `[c, h, w]` (channels first where both readings are possible).
    Whole numbers, also in floating type, are read as 0..255; floats with fractions must lie within 0..1 and are scaled to 0..255,
    fractions cut off.

    Args:
        source: a path, a PIL picture or an array.

    Returns:
        A PIL picture of mode RGB.

    Raises:
        RuntimeInputError: no such file, not a picture, a damaged one, or an array of another form or range.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the PIL picture")
    if not isinstance(source, (str, os.PathLike)):
        raise RuntimeInputError(f"a picture cannot be read from {type(source).__name__}; give a path, a PIL picture or a numpy array")
    text = os.fspath(source)
    if text.startswith(("http://", "https://", "data:")):
        raise RuntimeInputError(f"picture {text[:80]!r} is not a file; download it first and give its path")
    path = Path(text)
    if not path.exists():
        raise RuntimeInputError(f"picture {text!r} does not exist; check the path")
    if not path.is_file():
        raise RuntimeInputError(f"picture {text!r} is not a file; give the path of one picture")
    try:
        with Image.open(path) as opened:
            return _upright_rgb(opened, f"picture {text!r}")
    except UnidentifiedImageError as error:
        raise RuntimeInputError(f"picture {text!r} is not in a format that Pillow reads; convert it to PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise RuntimeInputError(f"picture {text!r} is too large to open safely ({error}); scale it down first") from error
    except OSError as error:
        raise RuntimeInputError(f"picture {text!r} cannot be read ({error}); check the file") from error


def prepare(image: Image.Image, rule: ImageRule) -> NDArray[np.float32]:
    """Fit a picture into its bucket and normalise it; equal to transformers' processors of the PIL kind.

    Args:
        image: what `load_image` returned (any other mode is converted or refused as `rule.convert_rgb` says).
        rule: the checkpoint's rule for this bucket.

    Returns:
        float32 of shape `rule.shape`, C-contiguous: `[3, height, width]`, or `[n_patches, 3 * temporal_patch * patch * patch]`.

    Raises:
        RuntimeInputError: a mode that the rule does not convert, or a picture too long and thin to be padded.
    """
    if image.mode != "RGB":
        if not rule.convert_rgb:
            raise RuntimeInputError(f"the picture's mode is {image.mode}, and this model's processor does not convert; give an RGB picture")
        image = load_image(image)
    if rule.fit == "crop":
        fitted = _crop(image, rule)
    else:
        boxed = _letterbox(image, rule) if rule.fit == "letterbox" else image
        fitted = np.asarray(boxed.resize((rule.width, rule.height), resample=rule.resample))
    # 256 possible values a channel: the arithmetic is done once per value, in the processors' order and precision.
    scaled = (np.arange(256, dtype=np.float64) * rule.rescale).astype(np.float32)
    mean, std = np.array(rule.mean, dtype=np.float32), np.array(rule.std, dtype=np.float32)
    table = (scaled[None, :] - mean[:, None]) / std[:, None]
    pixels = np.stack([table[channel][fitted[:, :, channel]] for channel in range(3)])
    return _patches(pixels, rule) if rule.layout == "patches" else pixels


def choose_bucket(image_size: tuple[int, int], rules: Sequence[ImageRule]) -> int:
    """The bucket a picture goes to: nearest aspect ratio, then nearest area (both as ratios), then the first.

    Args:
        image_size: (height, width) in pixels; a PIL picture's `size` is the other way round.
        rules: the bundle's buckets.

    Returns:
        Index into `rules`.

    Raises:
        RuntimeInputError: no bucket, or an empty picture.

    >>> square = ImageRule(224, 224, "resize", None, 3, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    >>> wide = ImageRule(112, 224, "resize", None, 3, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    >>> choose_bucket((480, 640), [square, wide]), choose_bucket((300, 640), [square, wide])
    (0, 1)
    """
    height, width = image_size
    if height < 1 or width < 1:
        raise RuntimeInputError(f"the picture is {height} x {width} pixels; it must have at least one")
    if not rules:
        raise RuntimeInputError("this bundle has no bucket for pictures; build it with inputs.images of 1 or more")

    def distance(index: int) -> tuple[Fraction, Fraction]:
        rule = rules[index]
        aspect = Fraction(height * rule.width, width * rule.height)
        area = Fraction(height * width, rule.height * rule.width)
        return max(aspect, 1 / aspect), max(area, 1 / area)

    return min(range(len(rules)), key=distance)


def _upright_rgb(image: Image.Image, what: str) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise RuntimeInputError(f"{what} is {image.height} x {image.width} pixels; it must have at least one")
    upright = ImageOps.exif_transpose(image)
    if "A" in upright.getbands() or upright.info.get("transparency") is not None:
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    return upright.convert("RGB")


def _from_array(array: NDArray[np.generic]) -> Image.Image:
    """An array as RGB; values are brought to 0..255 after transparency is put over white."""
    if array.dtype.kind not in "uif" or array.size == 0:
        what = f"dtype {array.dtype} and shape {array.shape}"
        raise RuntimeInputError(f"the picture array has {what}; give uint8 0..255 or float 0..1, not empty")
    values: NDArray[Any] = array[:, :, None] if array.ndim == 2 else array
    if values.ndim != 3 or not {values.shape[0], values.shape[-1]} & {1, 3, 4}:
        raise RuntimeInputError(f"the picture array has shape {array.shape}; give [h, w], [h, w, c] or [c, h, w] with 1, 3 or 4 channels")
    if array.ndim == 3 and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise RuntimeInputError("the picture array holds NaN or infinity; give finite values")
    if values.shape[-1] == 4:
        values = _over_white(values)
    low, high = values.min(), values.max()
    if low < 0 or high > 255:
        raise RuntimeInputError(f"the picture array's values reach from {low} to {high}; give 0..255, or floats within 0..1")
    if values.dtype.kind != "f" or np.allclose(values, values.astype(np.int64)):
        whole = values.astype(np.uint8)
    elif high <= 1:
        whole = (values.astype(np.float64) * 255).astype(np.float32).astype(np.uint8)
    else:
        raise RuntimeInputError(f"the picture array's values reach from {low} to {high}; fractional values must lie within 0..1")
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(whole, (*whole.shape[:2], 3))))


def _over_white(values: NDArray[Any]) -> NDArray[Any]:
    """`[h, w, 4]` -> `[h, w, 3]`; whole numbers have their opaque value at 255, floats at 1."""
    floating = values.dtype.kind == "f"
    if floating and (values.min() < 0 or values.max() > 1):
        what = f"from {values.min()} to {values.max()}"
        raise RuntimeInputError(f"the picture array's values reach {what}; with transparency, floats must lie within 0..1")
    white = 1.0 if floating else 255
    alpha = values[..., 3:] / white
    blended: NDArray[Any] = alpha * values[..., :3] + (1 - alpha) * white
    return blended.astype(values.dtype) if floating else np.round(blended).astype(values.dtype)


def _crop(image: Image.Image, rule: ImageRule) -> NDArray[np.uint8]:
    """Short edge to `shortest_edge` (or cover the bucket), cut out the centre, zeros where too small: uint8 `[height, width, 3]`."""
    width, height = image.size
    if rule.shortest_edge is None:
        cover = max(Fraction(rule.height, height), Fraction(rule.width, width))
        new_height, new_width = max(rule.height, int(height * cover)), max(rule.width, int(width * cover))
    elif width <= height:
        new_height, new_width = int(rule.shortest_edge * height / width), rule.shortest_edge
    else:
        new_height, new_width = rule.shortest_edge, int(rule.shortest_edge * width / height)
    top, left = (new_height - rule.height) // 2, (new_width - rule.width) // 2
    if new_height * new_width > _LARGEST_RESIZED and top >= 0 and left >= 0:
        across, down = width / new_width, height / new_height
        box = (left * across, top * down, (left + rule.width) * across, (top + rule.height) * down)
        return np.asarray(image.resize((rule.width, rule.height), resample=rule.resample, box=box))
    resized = np.asarray(image.resize((new_width, new_height), resample=rule.resample))
    canvas = np.zeros((rule.height, rule.width, 3), dtype=np.uint8)
    kept = resized[max(0, top) : top + rule.height, max(0, left) : left + rule.width]
    # A picture that is too small sits in the middle; an odd row or column of padding goes above or to the left.
    row, column = max(0, -top), max(0, -left)
    canvas[row : row + kept.shape[0], column : column + kept.shape[1]] = kept
    return canvas


def _letterbox(image: Image.Image, rule: ImageRule) -> Image.Image:
    """The picture in the middle of a canvas of the bucket's aspect, in the mean colour."""
    width, height = image.size
    if width * rule.height > height * rule.width:
        size = (width, max(height, round(Fraction(width * rule.height, rule.width))))
    else:
        size = (max(width, round(Fraction(height * rule.width, rule.height))), height)
    if size[0] * size[1] > _LARGEST_CANVAS:
        what = f"the picture of {height} x {width} pixels"
        raise RuntimeInputError(f"{what} would need a canvas of {size[1]} x {size[0]}; crop it or scale it down first")
    canvas = Image.new("RGB", size, tuple(int(value * 255) for value in rule.mean))
    canvas.paste(image, ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def _patches(pixels: NDArray[np.float32], rule: ImageRule) -> NDArray[np.float32]:
    """`[3, h, w]` -> `[n_patches, 3 * temporal_patch * patch * patch]`: merge x merge blocks in reading order, inside them the same."""
    rows, columns = rule.height // rule.patch // rule.merge, rule.width // rule.patch // rule.merge
    split = pixels.reshape(3, rows, rule.merge, rule.patch, columns, rule.merge, rule.patch)
    ordered = split.transpose(1, 4, 2, 5, 0, 3, 6)
    repeated = np.repeat(ordered[:, :, :, :, :, None], rule.temporal_patch, axis=5)
    return np.ascontiguousarray(repeated.reshape(rule.shape))
