"""Defaults that a configuration file may leave out, per `model_type`, and the decoder facts read with them.

Figures: the `configuration_*.py` of transformers 5.23; a test compares every one with the installed classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmc_export.core.errors import ModelError
from tmc_export.core.facts import DecoderFacts

__all__ = ["DEFAULTS", "decoder_facts", "decoder_windows", "filled"]

DEFAULTS: Mapping[str, Mapping[str, int | None]] = {
    "clip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32,
    },
    "siglip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16,
    },
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
        "vocab_size": 32000, "max_position_embeddings": 2048, "head_dim": None,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 131072, "head_dim": None, "sliding_window": 4096,
    },
    "qwen2": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 151936, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
    },
    "qwen3": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 151936, "max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28,
    },
    "qwen2_vl_vision": {
        "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "qwen2_5_vl_vision": {
        "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
    },
    "qwen2_vl_text": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 152064, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 80,
    },
    "qwen2_5_vl_text": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 152064, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 80,
    },
}  # fmt: skip


_MAY_BE_NULL = frozenset({"head_dim", "num_key_value_heads", "sliding_window"})
"""A null written for these says something (no window, as many KV heads as heads); for others it is as good as absent."""


def filled(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return a sub-configuration with the defaults of its `model_type` filled in.

    Raises:
        ModelError: the `model_type` has no entry.
    """
    kind = str(config.get("model_type", ""))
    if kind not in DEFAULTS:
        raise ModelError(f"the model's {part} is of type '{kind}', which is not served; served are: {', '.join(sorted(DEFAULTS))}")
    return {**DEFAULTS[kind], **{k: v for k, v in config.items() if v is not None or k in _MAY_BE_NULL or k not in DEFAULTS[kind]}}


def decoder_facts(text: Mapping[str, Any], *, tied: bool, rope_axes: int = 1) -> DecoderFacts:
    """Read the decoder's numbers out of a filled text configuration."""
    heads = int(text["num_attention_heads"])
    return DecoderFacts(
        layers=int(text["num_hidden_layers"]),
        width=int(text["hidden_size"]),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
        intermediate=int(text["intermediate_size"]),
        vocabulary=int(text["vocab_size"]),
        rope_axes=rope_axes,
        tied=tied,
        context=int(text["max_position_embeddings"]),
    )


def decoder_windows(text: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return each layer's sliding window in tokens, None where a layer sees everything before it."""
    layers = int(text["num_hidden_layers"])
    window = text.get("sliding_window")
    kinds = text.get("layer_types")
    if window is None:
        return (None,) * layers
    if text.get("model_type") == "mistral":
        return (int(window),) * layers
    if not text.get("use_sliding_window", False):
        return (None,) * layers
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
    first = int(text.get("max_window_layers") or 0)
    return tuple(int(window) if layer >= first else None for layer in range(layers))
