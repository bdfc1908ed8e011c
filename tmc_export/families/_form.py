"""The form of a `config.json`: whether the numbers that a family reads are numbers, before any family reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tmc_export.core.errors import ModelError

__all__ = ["check_form"]

_PARTS = ("text_config", "vision_config")
_COUNTS: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_attention_heads", "num_heads", "num_key_value_heads"), 1 << 12),
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "out_hidden_size", "head_dim", "vocab_size"), 1 << 24),
    **dict.fromkeys(("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size", "window_size"), 1 << 16),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), 1 << 30),
}
"""Key → largest value that is no damage; all are 1 or more where they are written at all."""
_TOKENS = ("image_token_index", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "llava": (("text_config",), ("vision_config",), ("image_token_index", "image_token_id")),
    "qwen2_vl": (("vision_config",),),
    "qwen2_5_vl": (("vision_config",),),
}
"""Family → keys that have no default; of several names, one."""
_MAPPINGS = (*_PARTS, "rope_scaling", "rope_parameters")


def check_form(config: Mapping[str, object], family: str = "") -> None:
    """Check what families read; an absent or null value is left to them, unless `family` has no default for it.

    Raises:
        ModelError: the first value that cannot be what its key says, or is missing.

    >>> check_form({"text_config": {"hidden_size": 64}})
    >>> check_form({"text_config": {"hidden_size": "64"}})
    Traceback (most recent call last):
        ...
    tmc_export.core.errors.ModelError: config.json: text_config.hidden_size must be a whole number from 1 to 16777216, ...
    """
    for where, part in _parts(config):
        for key, value in part.items():
            name = where + key
            if value is None:
                continue
            if key in _MAPPINGS and not isinstance(value, Mapping):
                raise _wrong(name, "a mapping", value)
            if key in _COUNTS and (type(value) is not int or not 1 <= value <= _COUNTS[key]):
                raise _wrong(name, f"a whole number from 1 to {_COUNTS[key]}", value)
            if key in _TOKENS and (type(value) is not int or value < 0):
                raise _wrong(name, "a token id", value)
    for keys in _NEEDED.get(family, ()):
        if all(config.get(key) is None for key in keys):
            raise ModelError(f"config.json: '{keys[0]}' is missing; the file is not one of the family '{family}': fetch it again")


def _parts(config: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    yield "", config
    for key in _PARTS:
        part = config.get(key)
        if isinstance(part, Mapping):
            yield f"{key}.", part


def _wrong(name: str, wanted: str, value: object) -> ModelError:
    shown = repr(value)
    return ModelError(
        f"config.json: {name} must be {wanted}, got {shown if len(shown) <= 60 else shown[:57] + '...'}; "
        "the file is damaged or not a model's: fetch it again"
    )
