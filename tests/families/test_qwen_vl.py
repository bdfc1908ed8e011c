"""Qwen2-VL's and Qwen2.5-VL's parts against Hugging Face's own models, at several picture sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from transformers.vision_utils import get_vision_window_index

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
from tests.families._small import save_small_qwen2_5_vl, save_small_qwen2_vl
from tmc_export.core.errors import ExportError, ModelError
from tmc_export.families import FAMILIES, family_of
from tmc_export.families._qwen_vision import make_windows
from tmc_export.plan.types import BlockPlan
from tmc_export.runtime._images import _patches, prepare
from tmc_export.runtime._mrope import mrope_positions
from tmc_export.surgery.attention import AttentionState, additive_mask, recording
from tmc_export.surgery.block import DecoderBlock
from tmc_export.surgery.vision import Vision

MAKERS = {"qwen2_vl": save_small_qwen2_vl, "qwen2_5_vl": save_small_qwen2_5_vl}
# Units of 28 pixels, windows of 4x4 units: even windows, padded windows, all patches at once with a mask, one window.
SIZES = {"even": (112, 224), "padded": (140, 196), "together": (140, 140), "single": (56, 84)}


@pytest.fixture(scope="module", params=list(MAKERS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(MAKERS[request.param](tmp_path_factory.mktemp("qwen") / "model"))


def patches(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    count = (size[0] // 14) * (size[1] // 14)
    return torch.randn(batch, count, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(count))


def grid_thw(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    return torch.tensor([[1, size[0] // 14, size[1] // 14]] * batch)


def hugging_face_tokens(loaded: Loaded, size: tuple[int, int], pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        parts = loaded.model.get_image_features(pixels.flatten(0, 1), grid_thw(size, pixels.shape[0])).pooler_output
    return torch.stack(list(parts))


# ----------------------------------------------------------------------------------------------------- JSON


def test_family_is_found_and_facts_agree_with_the_model(loaded: Loaded) -> None:
    facts, model = loaded.family.facts(loaded.files, (112, 224)), loaded.model
    text, visual = model.config.text_config, model.model.visual
    assert loaded.family is FAMILIES.get(model.config.model_type) and loaded.family.several_buckets
    assert facts.architecture == type(model).__name__
    assert (facts.encoder.layers, facts.encoder.width) == (len(visual.blocks), visual.patch_embed.proj.out_channels)
    assert (
        facts.encoder.intermediate
        == (visual.blocks[0].mlp.fc1 if hasattr(visual.blocks[0].mlp, "fc1") else visual.blocks[0].mlp.up_proj).out_features
    )
    assert (facts.encoder.class_tokens, facts.encoder.merge, facts.encoder.grid, facts.encoder.tokens) == (0, 2, (8, 16), 128)
    assert facts.visual_grid == (4, 8) and facts.visual_tokens == 32
    assert (facts.decoder.layers, facts.decoder.width, facts.decoder.kv_heads) == (
        text.num_hidden_layers,
        text.hidden_size,
        text.num_key_value_heads,
    )
    assert facts.decoder.head_dim == model.model.language_model.layers[0].self_attn.head_dim
    assert facts.decoder.rope_axes == 3 and facts.decoder.vocabulary == model.lm_head.out_features
    assert facts.image_token == model.config.image_token_id
    assert loaded.family.position_rule(loaded.files) == "mrope" and loaded.family.windows(loaded.files) == (None,) * 4


def test_tokens_and_image_rule(loaded: Loaded) -> None:
    rules = loaded.family.tokens(loaded.files)
    assert rules.eos == tuple(loaded.model.generation_config.eos_token_id) and len(rules.eos) == 2
    assert rules.image == loaded.model.config.image_token_id and rules.image_text == "<|vision_start|><|image_pad|><|vision_end|>"
    rule = loaded.family.image_rule(loaded.files, (112, 224), None)
    assert (rule.fit, rule.layout, rule.shape) == ("resize", "patches", tuple(patches((112, 224)).shape[1:]))
    assert loaded.family.default_size(loaded.files) == (224, 224)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_old_flat_and_new_nested_configurations_say_the_same(maker: object, tied: bool, tmp_path: Path) -> None:
    make = next(m for m in MAKERS.values() if m is maker)
    new, old = (files_of(make(tmp_path / str(flat), flat=flat, tied=tied)) for flat in (False, True))
    assert "text_config" in new.config and "text_config" not in old.config and "rope_scaling" in old.config
    family = family_of(dict(old.config))
    facts = family.facts(old, (112, 112))
    assert facts == family.facts(new, (112, 112)) and facts.decoder.tied is tied
    assert family.windows(old) == family.windows(new)
    for named in ("qwen2_vl", "qwen2_5_vl"):  # the hub's first vision_config names the whole model's type
        old.config["vision_config"]["model_type"] = named
        assert family.facts(old, (112, 112)) == facts


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({}, (448, 448)),
        ({"min_pixels": 3136, "max_pixels": 12845056}, (448, 448)),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, (448, 448)),
        ({"min_pixels": 500 * 500}, (504, 504)),
        ({"max_pixels": 300 * 300}, (280, 280)),
        ({"size": {"shortest_edge": 784, "longest_edge": 200}}, (28, 28)),
    ],
)
def test_default_size_stays_within_the_processor(section: dict[str, object], wanted: tuple[int, int], loaded: Loaded) -> None:
    section = {"image_processor_type": "Qwen2VLImageProcessor", **section}
    config = loaded.files
    old = type(config)(config.config, {}, {"processor_class": "Qwen2VLProcessor"}, section, {})
    new = type(config)(config.config, {}, {"image_processor": section}, {}, {})
    assert loaded.family.default_size(old) == loaded.family.default_size(new) == wanted
    assert loaded.family.image_rule(old, wanted, None) == loaded.family.image_rule(new, wanted, None)


def test_sizes_and_processors_that_do_not_suit_are_refused(loaded: Loaded) -> None:
    with pytest.raises(ModelError, match=r"image_size \[100, 224\] .* multiples of 28, the nearest are \[112, 224\]"):
        loaded.family.facts(loaded.files, (100, 224))
    with pytest.raises(ModelError, match="a patch grid of 7x8 cannot be merged 2x2"):
        loaded.family.facts(loaded.files, (112, 112), (7, 8))
    odd = type(loaded.files)(loaded.files.config, {}, {}, {**loaded.files.preprocessor, "merge_size": 1}, {})
    with pytest.raises(ModelError, match="do not belong together"):
        loaded.family.image_rule(odd, (112, 112), None)


# ----------------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize("name", SIZES)
def test_windows_are_those_of_transformers(name: str) -> None:
    size = SIZES[name]
    index, borders = get_vision_window_index(grid_thw(size), 2, 112, 14)
    windows = make_windows((size[0] // 14, size[1] // 14), 2, 4)
    if windows is None:
        assert name == "single" and borders.tolist() == [0, index.numel() * 4]
        return
    assert torch.equal(windows.order, index) and torch.equal(windows.restore, torch.argsort(index))
    owner = torch.repeat_interleave(torch.arange(len(borders) - 1), borders.diff())
    assert windows.count == len(borders) - 1 and windows.together == (name == "together")
    assert (windows.take is None) == (name in ("even", "together")) and (windows.mask is None) == (name == "even")
    if windows.take is not None and windows.put is not None:
        rows = owner[windows.take].reshape(windows.count, -1)
        assert torch.equal(rows, torch.arange(windows.count)[:, None].expand_as(rows))
        assert torch.equal(windows.take[windows.put], torch.arange(owner.numel()))
    elif windows.mask is not None:
        assert torch.equal(windows.mask[0, 0] == 0, owner[:, None] == owner[None])


@pytest.mark.parametrize("name", SIZES)
def test_vision_tokens(loaded: Loaded, name: str) -> None:
    plan, pixels = vision_plan(loaded, SIZES[name]), patches(SIZES[name], batch=2)
    with torch.no_grad():
        (got,) = Vision(loaded.family.vision(loaded.model, plan.size, plan.grid), plan)(pixels)
    wanted = hugging_face_tokens(loaded, plan.size, pixels)
    close(got, wanted)
    with pytest.raises(AssertionError, match="difference"):
        close(got.roll(1, dims=1), wanted)


@pytest.mark.parametrize("name", SIZES)
def test_encoder_layer_is_its_two_halves(loaded: Loaded, name: str) -> None:
    plan, pixels = vision_plan(loaded, SIZES[name]), patches(SIZES[name])
    parts = loaded.family.vision(loaded.model, plan.size, plan.grid)
    wanted = layer_outputs(lambda: hugging_face_tokens(loaded, plan.size, pixels), loaded.model.model.visual.blocks)
    assert parts.layers == len(wanted) == plan.facts.encoder.layers
    with torch.no_grad():
        tokens = parts.embed(pixels)
        for layer, expected in enumerate(wanted):
            tokens = parts.feed_forward(layer, parts.attend(layer, tokens, eager_core))
            close(tokens[0], expected)
            tokens = expected[None]


def test_windows_matter(loaded: Loaded) -> None:
    """The negative twin: without its windows Qwen2.5-VL gives other tokens, and Qwen2-VL has none."""
    size = SIZES["padded"]
    plan, pixels = vision_plan(loaded, size), patches(size)
    parts = loaded.family.vision(loaded.model, size, plan.grid)
    parts._full = frozenset(range(parts.layers))  # type: ignore[attr-defined]
    with torch.no_grad():
        (got,) = Vision(parts, plan)(pixels)
    far = float((got - hugging_face_tokens(loaded, size, pixels)).abs().max())
    assert far > 0.1 if loaded.family.name == "qwen2_5_vl" else far < 1e-5


def test_raster_is_the_picture_and_embeds_as_its_patches(loaded: Loaded) -> None:
    size = (84, 140)
    rule = loaded.family.image_rule(loaded.files, size, None)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    pixels = torch.from_numpy(prepare(picture, rule))[None]
    parts = loaded.family.vision(loaded.model, size, (6, 10))
    normal = (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - torch.tensor(rule.mean)[:, None, None]) / torch.tensor(rule.std)[
        :, None, None
    ]
    close(parts.raster(pixels)[0], normal)
    with torch.no_grad():
        assert torch.equal(parts.embed(parts.raster(pixels)), parts.embed(pixels))
        small = parts.raster(pixels)[:, :, :56, :84]
        wanted = hugging_face_tokens(loaded, (56, 84), parts_of(loaded, small))
        tokens = loaded.family.vision(loaded.model, size, (4, 6))
        got = tokens.embed(small)
        for layer in range(tokens.layers):
            got = tokens.feed_forward(layer, tokens.attend(layer, got, eager_core))
        close(tokens.project(got), wanted)


def parts_of(loaded: Loaded, raster: torch.Tensor) -> torch.Tensor:
    """Patches of a raster by the runtime's own code, which is tested against transformers' processor."""
    rule = loaded.family.image_rule(loaded.files, (raster.shape[2], raster.shape[3]), None)
    return torch.from_numpy(_patches(raster[0].numpy(), rule))[None]


def test_other_token_counts_are_refused(loaded: Loaded) -> None:
    parts = loaded.family.vision(loaded.model, (112, 112), (8, 8))
    with pytest.raises(ExportError, match="made for 64 patches"):
        parts.embed(patches((112, 84)))
    with torch.no_grad(), pytest.raises(ExportError, match="63 tokens arrive at encoder layer 0"):
        parts.attend(0, parts.embed(patches((112, 112)))[:, 1:], eager_core)


@pytest.mark.parametrize("name", SIZES)
def test_captured_vision_equals_hugging_face(loaded: Loaded, name: str, tmp_path: Path) -> None:
    if loaded.family.name == "qwen2_vl" and name in ("together", "single"):
        pytest.skip("no windows: two sizes are enough")
    pixels = patches(SIZES[name])
    got, graph = vision_in_onnxruntime(loaded, SIZES[name], pixels, tmp_path / "vision.onnx")
    close(got, hugging_face_tokens(loaded, SIZES[name], pixels), ROUNDED)
    operators = Counter(node.op_type for node in graph.graph)
    assert not {"Conv", "ScatterND", "NonZero", "Loop", "If"} & set(operators), operators
    expected = (
        {"even": (2, 0), "padded": (2, 1), "together": (1, 1), "single": (1, 0)}[name] if loaded.family.name == "qwen2_5_vl" else (1, 0)
    )
    assert _first_scores(graph) == expected


def _first_scores(graph: ir.Model) -> tuple[int | None, int]:
    """Batch of the first attention's scores (2 or 4 windows, else 1), capped at 2; whether a mask is added to them."""
    node = next(n for n in graph.graph if n.op_type == "Softmax")
    scores = node.inputs[0]
    assert scores is not None and scores.shape is not None
    producer = scores.producer()
    return min(2, int(scores.shape[0])), int(producer is not None and producer.op_type == "Add")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- decoder


def prompt(loaded: Loaded, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a prompt with one picture, and its positions `[3, 1, T]`."""
    count = size[0] * size[1] // 28**2
    image = loaded.family.tokens(loaded.files).image
    ids = np.array([3, 14, 15, 92, *[image] * count, 65, 35, 89, 79])
    positions = mrope_positions((ids == image).astype(np.int64), [(1, size[0] // 28, size[1] // 28)]).positions
    return torch.from_numpy(ids)[None], torch.from_numpy(positions)[:, None]


def assembled(loaded: Loaded, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of the prompt with the picture's tokens in place, positions, and Hugging Face's logits of the last token."""
    ids, positions = prompt(loaded, size)
    tokens = hugging_face_tokens(loaded, size, patches(size))
    image = ids == loaded.model.config.image_token_id
    with torch.no_grad():
        hidden = loaded.model.get_input_embeddings()(ids).masked_scatter(image[..., None], tokens)
        logits = loaded.model(
            input_ids=ids, pixel_values=patches(size)[0], image_grid_thw=grid_thw(size), mm_token_type_ids=image.long(), use_cache=False
        ).logits[:, -1]
    return hidden, positions, logits


def test_decoder_layer_by_layer(loaded: Loaded) -> None:
    hidden, positions, _ = assembled(loaded, (84, 140))
    text = loaded.model.model.language_model
    wanted = layer_outputs(lambda: text(inputs_embeds=hidden, position_ids=positions, use_cache=False), text.layers)
    parts = loaded.family.decoder(loaded.static)
    order = torch.arange(hidden.shape[1])[None]
    mask = additive_mask(order, order, order >= 0, None, hidden.dtype)
    empty = torch.zeros(1, 2, 0, 16)
    with torch.no_grad():
        rotary = parts.rotary(hidden, positions)
        flat = parts.rotary(hidden, order[None].expand(3, -1, -1))
        for layer, expected in enumerate(wanted):
            with recording(AttentionState(past={layer: (empty, empty)}, masks={layer: mask})) as state:
                got = parts.run(layer, hidden, rotary)
            close(got, expected)
            with recording(AttentionState(past={layer: (empty, empty)}, masks={layer: mask})) as alone:
                parts.attention_only(layer, hidden, rotary)
            assert torch.equal(alone.keys[layer], state.keys[layer])
            with (
                recording(AttentionState(past={layer: (empty, empty)}, masks={layer: mask})),
                pytest.raises(AssertionError, match="difference"),
            ):
                close(parts.run(layer, hidden, flat), expected)  # counted as text: something else
            hidden = expected


def test_captured_decoder_equals_the_whole_model(loaded: Loaded, tmp_path: Path) -> None:
    hidden, positions, wanted = assembled(loaded, (84, 140))
    count = hidden.shape[1]
    plan = BlockPlan(0, 0, 4, tokens=count, visual_tokens=15, capacity=count + 1, head=True)
    inputs = block_inputs(loaded, plan, hidden, positions, past=3)
    logits, *new = block_in_onnxruntime(loaded, plan, inputs, tmp_path / "block.onnx")
    close(logits, wanted, ROUNDED)
    with torch.no_grad():
        eager = DecoderBlock(loaded.family.decoder(loaded.static), plan, loaded.family.windows(loaded.files))(*inputs)
    for got, expected in zip([logits, *new], eager, strict=True):
        close(got, expected, ROUNDED)


# ----------------------------------------------------------------------------------------------------- the factory


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_a_hub_layout_of_old_binds_every_tensor(maker: object, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from tmc_export.export.checkpoint import open_checkpoint
    from tmc_export.export.skeleton import make_skeleton

    make = next(m for m in MAKERS.values() if m is maker)
    folder = make(tmp_path / "model", flat=True, tied=True)
    skeleton = make_skeleton(AutoConfig.from_pretrained(folder), torch.float32, "eager")
    checkpoint = open_checkpoint(folder, skeleton)
    loaded = load(folder)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(checkpoint.read(name, torch.float32), tensor), name
    assert checkpoint.identity("lm_head.weight") == checkpoint.identity("model.language_model.embed_tokens.weight")


def test_greedy_answers_are_varied(loaded: Loaded) -> None:
    size = (84, 140)
    ids, _ = prompt(loaded, size)
    image = (ids == loaded.model.config.image_token_id).long()
    with torch.no_grad():
        answer = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches(size)[0],
            image_grid_thw=grid_thw(size),
            mm_token_type_ids=image,
            max_new_tokens=32,
            do_sample=False,
        )[0, ids.shape[1] :]
    assert answer.numel() == 32 and answer.unique().numel() >= 16
