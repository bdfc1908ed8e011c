"""Every default in the table against the configuration class of the installed transformers, and how configurations are read with them."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig

from tmc_export.core.errors import ModelError
from tmc_export.families._defaults import DEFAULTS, decoder_facts, decoder_windows, filled

_CLASSES: dict[str, type[PreTrainedConfig]] = {
    "clip_vision_model": CLIPVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
    "qwen2_vl_vision": Qwen2VLVisionConfig,
    "qwen2_5_vl_vision": Qwen2_5_VLVisionConfig,
    "qwen2_vl_text": Qwen2VLTextConfig,
    "qwen2_5_vl_text": Qwen2_5_VLTextConfig,
}
_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text")


def made(kind: str, **options: object) -> PreTrainedConfig:
    return _CLASSES[kind](**options) if kind in _CLASSES else AutoConfig.for_model(kind, **options)


def declared(kind: str, name: str) -> object:
    """The field's default as written, before `__post_init__` derives others from it."""
    fields = type(made(kind)).__dataclass_fields__
    return fields[name].default


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in DEFAULTS.items() for name in table])
def test_default_is_that_of_transformers(kind: str, name: str) -> None:
    assert made(kind).model_type == kind
    assert DEFAULTS[kind][name] == declared(kind, name)


@pytest.mark.parametrize("kind", _DECODERS)
def test_an_empty_configuration_gives_the_numbers_of_the_model(kind: str) -> None:
    config, facts = made(kind), decoder_facts(filled({"model_type": kind}, "decoder"), tied=False)
    assert facts.layers == config.num_hidden_layers and facts.heads == config.num_attention_heads
    assert facts.kv_heads == config.num_key_value_heads and facts.vocabulary == config.vocab_size
    assert facts.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert facts.context == config.max_position_embeddings


@pytest.mark.parametrize("kind", _DECODERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 7},
        {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "max_window_layers": 0},
    ],
    ids=["default", "none", "window", "in-use", "everywhere"],
)
def test_windows_are_those_of_transformers(kind: str, options: dict[str, object]) -> None:
    options = {**options, "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = made(kind, **options)
    window = getattr(config, "sliding_window", None)
    if kind == "llama":
        wanted: tuple[object, ...] = (None,) * 4
        options.pop("sliding_window", None)
    elif kind == "mistral":
        wanted = (window,) * 4
    else:
        wanted = tuple(window if layer == "sliding_attention" else None for layer in config.layer_types)
    assert decoder_windows(filled({"model_type": kind, **options}, "decoder")) == wanted
    saved = config.to_dict()
    if kind != "llama":
        assert decoder_windows(filled(saved, "decoder")) == wanted


def test_what_is_written_counts_and_null_falls_back() -> None:
    text = filled({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": None, "rms_norm_eps": None}, "decoder")
    assert text["hidden_size"] == 64 and text["num_hidden_layers"] == 32 and text["rms_norm_eps"] is None


@pytest.mark.parametrize("kind", [kind for kind in _DECODERS if kind != "mistral"])  # whose class refuses a null there
def test_null_kv_heads_are_as_many_as_heads(kind: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": None}
    facts = decoder_facts(filled({"model_type": kind, **sizes}, "decoder"), tied=False)
    assert facts.kv_heads == made(kind, **sizes).num_key_value_heads == 4


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ModelError, match="decoder is of type 'gpt9', which is not served; served are: clip_vision_model"):
        filled({"model_type": "gpt9"}, "decoder")
