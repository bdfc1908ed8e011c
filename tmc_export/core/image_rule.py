"""What happens to a picture before the vision graph sees it, as plain data.

Read from the checkpoint when a bundle is built, carried by the bundle, obeyed by the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from tmc_export.core.errors import ModelError

__all__ = ["ImageRule"]

_FITS = ("crop", "resize", "letterbox")
_LAYOUTS = ("pixels", "patches")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_NAMES = {
    "CLIPImageProcessor": "clip",
    "CLIPFeatureExtractor": "clip",
    "LlavaImageProcessor": "llava",
    "SiglipImageProcessor": "siglip",
    "Qwen2VLImageProcessor": "qwen2_vl",
}
# Read below, or without influence on the pixels of one picture in a static bucket.
_KEYS = frozenset(
    "image_processor_type feature_extractor_type processor_class do_resize size resample do_center_crop crop_size do_rescale "
    "rescale_factor do_normalize image_mean image_std do_convert_rgb do_pad pad_size patch_size temporal_patch_size merge_size "
    "min_pixels max_pixels default_to_square data_format input_data_format return_tensors device disable_grouping "
    "model_input_names _valid_processor_keys image_seq_length".split()
)


@dataclass(frozen=True)
class ImageRule:
    """The way from any RGB picture to one static input of the vision graph.

    Attributes:
        height, width: the bucket, in pixels.
        fit: how a picture of another size gets there. `crop`: the short edge becomes `shortest_edge` (or, where that is None, the picture
            just covers the bucket), then the centre is cut out, and zeros fill what the picture does not reach. `resize`: stretched.
            `letterbox`: padded with the mean colour to the bucket's aspect, centred, then resized.
        shortest_edge: pixels of the short edge before the cut; only for `crop`.
        resample: Pillow's filter code (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming).
        rescale: factor on the 0..255 values; 1.0 where the processor does not rescale.
        mean, std: per channel, applied after `rescale`; 0 and 1 where the processor does not normalise.
        convert_rgb: pictures of other modes become RGB, transparency over white; else they are refused.
        layout: `pixels`: float32 `[3, height, width]`. `patches`: float32 `[n_patches, 3 * temporal_patch * patch * patch]`, with
            n_patches = height / patch * width / patch, in the order of `merge` x `merge` blocks.
        patch: side of a patch in pixels; 1 for the `pixels` layout, like the next two.
        temporal_patch: frames that a patch spans; a still picture is repeated.
        merge: patches per side that the projector joins.

    Raises:
        ModelError: where the fields contradict each other.
    """

    height: int
    width: int
    fit: str
    shortest_edge: int | None
    resample: int
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    convert_rgb: bool = True
    layout: str = "pixels"
    patch: int = 1
    temporal_patch: int = 1
    merge: int = 1

    def __post_init__(self) -> None:
        if self.fit not in _FITS:
            raise ModelError(f"image rule: fit is {self.fit!r}; choose one of {', '.join(_FITS)}")
        if self.layout not in _LAYOUTS:
            raise ModelError(f"image rule: layout is {self.layout!r}; choose one of {', '.join(_LAYOUTS)}")
        for name in ("height", "width", "patch", "temporal_patch", "merge"):
            if getattr(self, name) < 1:
                raise ModelError(f"image rule: {name} is {getattr(self, name)}; it must be 1 or more")
        if self.shortest_edge is not None and (self.fit != "crop" or self.shortest_edge < 1):
            raise ModelError(
                f"image rule: shortest_edge is {self.shortest_edge} with fit {self.fit!r}; give 1 or more, only with fit 'crop'"
            )
        if self.resample not in range(6):
            raise ModelError(f"image rule: resample is {self.resample}; Pillow's filters are 0 to 5")
        if 0.0 in self.std:
            raise ModelError(f"image rule: std is {self.std}; a channel's deviation cannot be zero")
        step = self.patch * self.merge
        if self.layout == "patches" and (self.height % step or self.width % step):
            near = "x".join(str(max(step, round(side / step) * step)) for side in (self.height, self.width))
            raise ModelError(
                f"image size {self.height}x{self.width} is not a multiple of patch x merge = {step} pixels; the nearest that is: {near}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one prepared picture, without batch axis."""
        if self.layout == "pixels":
            return (3, self.height, self.width)
        rows, columns = self.height // self.patch, self.width // self.patch
        return (rows * columns, 3 * self.temporal_patch * self.patch * self.patch)

    def to_json(self) -> dict[str, object]:
        """The rule in JSON's own types; `from_json` turns it back into an equal rule."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> ImageRule:
        """Read what `to_json` wrote.

        Raises:
            ModelError: a field is missing, unknown or of the wrong type.
        """
        known = {field.name for field in fields(cls)}
        if data.keys() != known:
            missing, unknown = sorted(known - data.keys()), sorted(data.keys() - known)
            raise ModelError(f"image rule: missing {missing}, unknown {unknown}; write it with this version")
        edge = data["shortest_edge"]
        return cls(
            height=_whole(data, "height"),
            width=_whole(data, "width"),
            fit=str(data["fit"]),
            shortest_edge=None if edge is None else _whole(data, "shortest_edge"),
            resample=_whole(data, "resample"),
            rescale=_number(data, "rescale"),
            mean=_triple(data, "mean"),
            std=_triple(data, "std"),
            convert_rgb=_flag(data, "convert_rgb", True),
            layout=str(data["layout"]),
            patch=_whole(data, "patch"),
            temporal_patch=_whole(data, "temporal_patch"),
            merge=_whole(data, "merge"),
        )

    @classmethod
    def from_processor(cls, config: Mapping[str, object], *, height: int, width: int, fit: str | None = None) -> ImageRule:
        """Read a checkpoint's image processor for one bucket.

        The processor's own way of fitting is the default: CLIP cuts the centre, SigLIP and Qwen2-VL stretch, LLaVA with `do_pad`
        letterboxes. Where the bucket is not the processor's own size, the same is done in proportion. Qwen2-VL's pixel limits are left
        to the choice of buckets.

        Args:
            config: `processor_config.json` (its `image_processor` section is taken) or `preprocessor_config.json`.
            height: the bucket's height in pixels.
            width: the bucket's width in pixels.
            fit: `crop`, `resize` or `letterbox` in place of the processor's own way.

        Raises:
            ModelError: a processor, an option or a size that this version does not know.
        """
        section = config.get("image_processor", config)
        if not isinstance(section, Mapping):
            raise ModelError(f"image processor: 'image_processor' is {section!r}; it must be a JSON object")
        kind = _kind(section)
        if _flag(section, "do_pad", False) and kind != "llava":
            raise ModelError("image processor: do_pad is on, which only LlavaImageProcessor defines for a single picture; set it to false")
        own_fit, edge = _own_fit(section, kind, height, width, fit)
        clip_like = kind != "siglip"
        normalise = _flag(section, "do_normalize", True)
        patches = kind == "qwen2_vl"
        return cls(
            height=height,
            width=width,
            fit=own_fit,
            shortest_edge=edge,
            resample=_whole(section, "resample", 3),
            rescale=_number(section, "rescale_factor", 1 / 255) if _flag(section, "do_rescale", True) else 1.0,
            mean=_triple(section, "image_mean", _CLIP_MEAN if clip_like else _HALF) if normalise else (0.0, 0.0, 0.0),
            std=_triple(section, "image_std", _CLIP_STD if clip_like else _HALF) if normalise else (1.0, 1.0, 1.0),
            convert_rgb=_flag(section, "do_convert_rgb", True),
            layout="patches" if patches else "pixels",
            patch=_whole(section, "patch_size", 14) if patches else 1,
            temporal_patch=_whole(section, "temporal_patch_size", 2) if patches else 1,
            merge=_whole(section, "merge_size", 2) if patches else 1,
        )


def _kind(section: Mapping[str, object]) -> str:
    """Which of the known processors this is; refuses the others, and options nobody reads."""
    name = section.get("image_processor_type", section.get("feature_extractor_type"))
    if not isinstance(name, str):
        raise ModelError("image processor: no image_processor_type; give processor_config.json or preprocessor_config.json")
    kind = _NAMES.get(name) or _NAMES.get(name.removesuffix("Fast").removesuffix("Pil"))
    if kind is None:
        raise ModelError(f"image processor {name!r} is not known; known: {', '.join(sorted(_NAMES))} (also with Fast or Pil at the end)")
    strange = sorted(key for key in section.keys() - _KEYS if section[key] not in (None, False))
    if strange:
        option = f"{strange[0]}={section[strange[0]]!r}"
        raise ModelError(f"image processor {name}: option {option} is not known; remove it if it does not change the pixels")
    return kind


def _own_fit(section: Mapping[str, object], kind: str, height: int, width: int, fit: str | None) -> tuple[str, int | None]:
    """The fit and the short edge that this processor means for the bucket."""
    if not _flag(section, "do_resize", True) and fit is None:
        raise ModelError("image processor: do_resize is off, so that pictures keep their size; choose a fit: crop, resize or letterbox")
    if kind in ("siglip", "qwen2_vl"):
        if _flag(section, "do_center_crop", False):
            raise ModelError("image processor: do_center_crop is on, which this processor does not define; set it to false")
        return fit or "resize", None
    cuts = _flag(section, "do_center_crop", True)
    crop = _sides(section, "crop_size", square=True) if cuts else None
    edge = _sides(section, "size", square=False)
    if fit is None and _flag(section, "do_pad", False):
        if crop is not None and crop != (edge if isinstance(edge, tuple) else (edge, edge)):
            raise ModelError(f"image processor: do_pad with size {edge} and crop_size {crop} cuts the padded picture; choose a fit")
        return "letterbox", None
    if fit not in (None, "crop"):
        return str(fit), None
    if isinstance(edge, tuple):
        if fit is None and (crop is None or crop == edge):
            return "resize", None
        if fit is None:
            raise ModelError(f"image processor: size {edge} is cut to crop_size {crop}; this stretch-then-cut is not known, choose a fit")
        return "crop", None
    if crop is None:
        if fit is None:
            raise ModelError("image processor: size.shortest_edge without do_center_crop gives pictures of any size; choose a fit")
        return "crop", None
    if not isinstance(crop, tuple):
        raise ModelError(f"image processor: crop_size is {section.get('crop_size')!r}; give height and width")
    if (height, width) == crop:
        return "crop", edge
    same_aspect = height * crop[1] == width * crop[0]
    return "crop", round(edge * height / crop[0]) if same_aspect else None


def _sides(section: Mapping[str, object], key: str, *, square: bool) -> int | tuple[int, int]:
    """A size in any of its spellings: the short edge as one number, or (height, width)."""
    value = section.get(key)
    if value is None:
        return (224, 224) if square else 224
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value) if square else value
    if isinstance(value, Mapping):
        named = {name: number for name, number in value.items() if number is not None}
        if named.keys() == {"height", "width"}:
            return _whole(named, "height"), _whole(named, "width")
        if named.keys() == {"shortest_edge"} and not square:
            return _whole(named, "shortest_edge")
    raise ModelError(f"image processor: {key} is {value!r}; known are a number, height and width{'' if square else ', or shortest_edge'}")


def _whole(data: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = default if data.get(key) is None else data[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"image processor: {key} is {value!r}; it must be a whole number")
    return value


def _number(data: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = default if data.get(key) is None else data[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"image processor: {key} is {value!r}; it must be a number")
    return float(value)


def _flag(data: Mapping[str, object], key: str, default: bool) -> bool:
    value = default if data.get(key) is None else data[key]
    if not isinstance(value, bool):
        raise ModelError(f"image processor: {key} is {value!r}; it must be true or false")
    return value


def _triple(data: Mapping[str, object], key: str, default: tuple[float, float, float] | None = None) -> tuple[float, float, float]:
    value = default if data.get(key) is None else data[key]
    if isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value):
        return float(value[0]), float(value[1]), float(value[2])
    raise ModelError(f"image processor: {key} is {value!r}; it must be three numbers, one per channel")
