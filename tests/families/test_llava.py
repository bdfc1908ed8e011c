"""LLaVA's parts against Hugging Face's own model, for both towers and all four decoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families._parity import (
    ROUNDED,
    Loaded,
    block_in_onnxruntime,
    block_inputs,
    close,
    eager_core,
    files_of,
    layer_outputs,
    load,
    vision_in_onnxruntime,
    vision_plan,
)
from tests.families._small import save_small_llava
from tmc_export.core.errors import ModelError
from tmc_export.families import FAMILIES, family_of
from tmc_export.families._contract import ModelFiles
from tmc_export.families.llava import Llava
from tmc_export.plan.types import BlockPlan
from tmc_export.surgery.attention import AttentionState, additive_mask, recording
from tmc_export.surgery.block import DecoderBlock
from tmc_export.surgery.vision import Vision

PAIRS = (("llama", "clip"), ("qwen2", "siglip"), ("qwen3", "clip"), ("mistral", "siglip"))
SIZE = (84, 84)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    decoder, tower = request.param
    window = 9 if decoder in ("mistral", "qwen2") else None
    return load(save_small_llava(tmp_path_factory.mktemp("llava") / "model", decoder, tower, window=window))


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def embeddings(loaded: Loaded, count: int) -> torch.Tensor:
    width = loaded.model.config.text_config.hidden_size
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(2))


def test_family_is_found_and_facts_agree_with_the_model(loaded: Loaded) -> None:
    assert loaded.family is FAMILIES.get("llava")
    facts, model = loaded.family.facts(loaded.files, SIZE), loaded.model
    text = model.config.text_config
    assert loaded.family.default_size(loaded.files) == SIZE
    assert facts.encoder.layers == model.config.vision_config.num_hidden_layers - 1
    assert facts.encoder.tokens == facts.encoder.class_tokens + 36 and facts.visual_tokens == 36
    assert facts.decoder.head_dim == model.model.language_model.layers[0].self_attn.head_dim
    assert (facts.decoder.layers, facts.decoder.width, facts.decoder.kv_heads) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.num_key_value_heads,
    )
    assert facts.decoder.vocabulary == model.lm_head.out_features
    assert loaded.family.tokens(loaded.files).image == model.config.image_token_id
    assert loaded.family.tokens(loaded.files).eos == (model.generation_config.eos_token_id,)


def test_windows_are_those_of_the_layers(loaded: Loaded) -> None:
    windows = loaded.family.windows(loaded.files)
    kind = loaded.model.config.text_config.model_type
    assert windows == {"llama": (None,) * 4, "qwen3": (None,) * 4, "mistral": (9,) * 4, "qwen2": (None, None, 9, 9)}[kind]


def test_vision_tokens(loaded: Loaded) -> None:
    plan = vision_plan(loaded, SIZE)
    with torch.no_grad():
        (got,) = Vision(loaded.family.vision(loaded.model, SIZE, plan.grid), plan)(pixels())
        wanted = loaded.model.get_image_features(pixels()).pooler_output
    close(got[0], wanted[0])
    with pytest.raises(AssertionError, match="difference"):
        close(got[0], wanted[0] + 2e-5)


def test_encoder_layer_is_its_two_halves(loaded: Loaded) -> None:
    parts = loaded.family.vision(loaded.model, SIZE, (6, 6))
    layers = loaded.model.model.vision_tower.encoder.layers
    wanted = layer_outputs(lambda: loaded.model.get_image_features(pixels()), layers)
    assert parts.layers == len(layers) - 1
    with torch.no_grad():
        tokens = parts.embed(pixels())
        for layer in range(parts.layers):
            tokens = parts.feed_forward(layer, parts.attend(layer, tokens, eager_core))
            close(tokens, wanted[layer])
            tokens = wanted[layer]


def test_decoder_layer_by_layer(loaded: Loaded) -> None:
    count = 20
    hidden, windows = embeddings(loaded, count), loaded.family.windows(loaded.files)
    text = loaded.model.model.language_model
    wanted = layer_outputs(lambda: text(inputs_embeds=hidden, use_cache=False), text.layers)
    parts = loaded.family.decoder(loaded.static)
    order = torch.arange(count)[None]
    with torch.no_grad():
        rotary = parts.rotary(hidden, order[None])
        for layer, expected in enumerate(wanted):
            mask = additive_mask(order, order, order >= 0, windows[layer], hidden.dtype)
            attention = parts.layers[layer].self_attn
            empty = torch.zeros(1, attention.k_proj.out_features // attention.head_dim, 0, attention.head_dim)
            with recording(AttentionState(past={layer: (empty, empty)}, masks={layer: mask})) as state:
                got = parts.run(layer, hidden, rotary)
            close(got, expected)
            with recording(AttentionState(past={layer: (empty, empty)}, masks={layer: mask}, wanted={layer: "all"})) as alone:
                parts.attention_only(layer, hidden, rotary)
            assert torch.equal(alone.keys[layer], state.keys[layer]) and alone.queries[layer].shape[2] == count
            hidden = expected


def test_captured_vision_equals_hugging_face(loaded: Loaded, tmp_path: Path) -> None:
    got, _ = vision_in_onnxruntime(loaded, SIZE, pixels(), tmp_path / "vision.onnx")
    with torch.no_grad():
        close(got[0], loaded.model.get_image_features(pixels()).pooler_output[0], ROUNDED)


def test_captured_decoder_equals_hugging_face(loaded: Loaded, tmp_path: Path) -> None:
    text, given = loaded.model.model.language_model, embeddings(loaded, 20)
    _, hidden, _, _ = layer_outputs(lambda: text(inputs_embeds=given, use_cache=False), text.layers)
    plan = BlockPlan(1, 2, 4, tokens=20, visual_tokens=0, capacity=24, head=True)
    inputs = block_inputs(loaded, plan, hidden, torch.arange(20)[None, None], past=0)
    logits, *new = block_in_onnxruntime(loaded, plan, inputs, tmp_path / "block.onnx")
    with torch.no_grad():
        eager = DecoderBlock(loaded.family.decoder(loaded.static), plan, loaded.family.windows(loaded.files))(*inputs)
        close(logits, loaded.model(inputs_embeds=given, use_cache=False).logits[:, -1], ROUNDED)
    for got, expected in zip([logits, *new], eager, strict=True):
        close(got, expected, ROUNDED)


def test_a_variant_that_is_not_served_is_refused(tmp_path: Path) -> None:
    files = files_of(save_small_llava(tmp_path / "model"))
    family = family_of(dict(files.config))
    with pytest.raises(ModelError, match=r"image_size \[98, 84\] does not suit"):
        family.facts(files, (98, 84))
    for change, says in (
        ({"vision_feature_layer": [-2, -1]}, "features of several layers"),
        ({"vision_feature_layer": -9}, "is not one of the encoder's 3 layers"),
        ({"vision_feature_select_strategy": "full"}, "keeps the class token"),
        ({"vision_feature_select_strategy": "odd"}, "'odd' is not served"),
        ({"text_config": {"model_type": "gpt9"}}, "type 'gpt9', which is not served"),
    ):
        files.config.update(change)  # type: ignore[attr-defined]
        with pytest.raises(ModelError, match=says):
            family.facts(files, SIZE)
        files = files_of(tmp_path / "model")


def test_no_family_is_an_error_that_lists_the_served() -> None:
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration.*Qwen2VLForConditionalGeneration"):
        family_of({"architectures": ["OtherForConditionalGeneration"]})


@pytest.mark.parametrize(
    ("generation", "text", "ends"),
    [({"eos_token_id": [7, 9]}, 5, (7, 9)), ({"eos_token_id": None}, 5, (5,)), ({}, [5, 6], (5, 6)), ({"eos_token_id": None}, None, (2,))],
)
def test_end_tokens_may_be_a_list_absent_or_null(generation: dict[str, object], text: object, ends: tuple[int, ...]) -> None:
    files = ModelFiles({"text_config": {"eos_token_id": text}, "image_token_index": 4}, generation, {}, {}, {})
    assert Llava.tokens(files).eos == ends
