"""The reference of Qwen2-VL and Qwen2.5-VL: Hugging Face when nothing is compressed, and three-axis positions when something is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.families._small import save_small_qwen2_5_vl, save_small_qwen2_vl  # noqa: E402
from tmc_export.core.errors import ExportError, RuntimeInputError  # noqa: E402
from tmc_export.families import FAMILIES  # noqa: E402
from tmc_export.plan.resolve import resolve  # noqa: E402
from tmc_export.plan.source import read_model_files  # noqa: E402
from tmc_export.plan.types import Plan  # noqa: E402
from tmc_export.recipe import load_recipe  # noqa: E402
from tmc_export.runtime._chat import expand_image_tokens  # noqa: E402
from tmc_export.runtime._images import load_image, prepare  # noqa: E402
from tmc_export.runtime._mrope import mrope_positions  # noqa: E402
from tmc_export.verify._qwen_tower import QwenTower  # noqa: E402
from tmc_export.verify.reference import Reference, ReferenceTurn  # noqa: E402

SAVE = {"qwen2_vl": save_small_qwen2_vl, "qwen2_5_vl": save_small_qwen2_5_vl}
SIZES = ((112, 168), (168, 112), (84, 140))
"""Buckets; the first two have equally many patches. Qwen2.5-VL's windows do not divide any of them evenly."""
RANDOM = "- {at: projector, method: random, keep: 7}"
POOL = "- {at: projector, method: pool, kernel: 2, mode: average}"
FASTV = "- {at: decoder.2, method: fastv, keep: 50%}"
DOWN = "- {at: input, method: downsample, grid: [4, 6]}"


@pytest.fixture(scope="module", params=sorted(SAVE))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def planned(small: Path) -> Callable[..., Plan]:
    files = read_model_files(small)

    def make(compress: str = "", sizes: tuple[tuple[int, int], ...] = SIZES) -> Plan:
        path = write(small.parent, compress, sizes)
        return resolve(load_recipe(path), files)

    return make


def write(folder: Path, compress: str, sizes: tuple[tuple[int, int], ...]) -> Path:
    path = folder / "recipe.yaml"
    lines = ["recipe: 1", "name: test", "model: {source: ./model, dtype: float32}"]
    lines += [f"inputs: {{images: 2, image_size: {[list(s) for s in sizes]}, text_tokens: 40, new_tokens: 16}}"]
    lines += ["compress:", f"  {compress}"] if compress else []
    path.write_text("\n".join([*lines, "target: {device: cpu, runtime: onnxruntime}", ""]), "utf-8")
    return path


def picture(small: Path, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    files = read_model_files(small)
    rule = FAMILIES.get(str(files.config["model_type"])).image_rule(files, size, None)
    return prepare(load_image(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)), rule)


def ask(
    reference: Reference, pictures: list[np.ndarray], buckets: list[int], head: list[int] | None = None, **options: Any
) -> ReferenceTurn:
    """Text, each picture with text behind it."""
    image = reference.plan.facts.image_token
    ids = list(head or [30, 31, 32])
    for number in range(len(pictures)):
        ids += [image, 40 + number, 41, 42]
    expanded, group = expand_image_tokens(ids, image, reference.visual_tokens(pictures, buckets))
    return reference.turn(pictures, expanded, group.astype(np.int64), buckets=buckets, until_eos=False, **options)


def generate(
    reference: Reference, pictures: list[np.ndarray], buckets: list[int], ids: np.ndarray, steps: int
) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and logits by transformers' own `generate`, whole pictures only."""
    grids = [(1, SIZES[b][0] // 14, SIZES[b][1] // 14) for b in buckets]
    given = torch.from_numpy(ids)[None]
    out = reference.model.whole.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        pixel_values=torch.from_numpy(np.concatenate(pictures)),
        image_grid_thw=torch.tensor(grids),
        mm_token_type_ids=(given == reference.plan.facts.image_token).long(),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, given.shape[1] :].tolist(), torch.cat(out.logits).numpy()


@pytest.mark.parametrize("buckets", [[0], [1], [2], [1, 2]])
def test_an_empty_plan_is_generate(small: Path, planned: Callable[..., Plan], buckets: list[int]) -> None:
    reference = Reference(small, planned())
    pictures = [picture(small, SIZES[b], b) for b in buckets]
    got = ask(reference, pictures, buckets, max_new_tokens=16)
    ids, _ = expand_image_tokens(
        [30, 31, 32, *(t for n in range(len(buckets)) for t in (reference.plan.facts.image_token, 40 + n, 41, 42))],
        reference.plan.facts.image_token,
        reference.visual_tokens(pictures, buckets),
    )
    tokens, logits = generate(reference, pictures, buckets, ids, 16)
    assert list(got.tokens) == tokens and len(set(tokens)) > 4
    np.testing.assert_allclose(got.logits, logits, rtol=0, atol=2e-5)


def test_a_later_turn_is_the_whole_conversation(small: Path, planned: Callable[..., Plan]) -> None:
    reference = Reference(small, planned())
    image = reference.plan.facts.image_token
    one, two = picture(small, SIZES[0], 1), picture(small, SIZES[2], 2)
    first = ask(reference, [one], [0], max_new_tokens=4)
    second = ask(reference, [two], [2], head=[first.tokens[-1], 50, 51], max_new_tokens=8)
    counts = [*reference.visual_tokens([one], [0]), *reference.visual_tokens([two], [2])]
    whole, _ = expand_image_tokens([30, 31, 32, image, 40, 41, 42, *first.tokens, 50, 51, image, 40, 41, 42], image, counts)
    tokens, logits = generate(reference, [one, two], [0, 2], whole, 8)
    assert list(second.tokens) == tokens
    np.testing.assert_allclose(second.logits, logits, rtol=0, atol=2e-5)


def test_kept_tokens_keep_the_places_they_come_from(small: Path, planned: Callable[..., Plan]) -> None:
    shot = picture(small, SIZES[0])
    whole = ask(Reference(small, planned()), [shot], [0], max_new_tokens=1).positions
    got = ask(Reference(small, planned(RANDOM, SIZES[:1])), [shot], [0], max_new_tokens=1)
    assert whole is not None and got.positions is not None and len(got.stages[0].source) == 7
    kept = 3 + got.stages[0].source
    np.testing.assert_array_equal(got.positions[:, 3:10], whole[:, kept])
    np.testing.assert_array_equal(got.positions[:, 10:], whole[:, -3:])
    assert len(np.unique(got.positions[1, 3:10])) > 1


def test_a_coarser_raster_is_numbered_as_such(small: Path, planned: Callable[..., Plan]) -> None:
    plan = planned(POOL, SIZES[:1])
    got = ask(Reference(small, plan), [picture(small, SIZES[0])], [0], max_new_tokens=1)
    group = np.array([0] * 3 + [1] * 6 + [0] * 3)
    np.testing.assert_array_equal(got.positions, mrope_positions(group, [(1, 2, 3)]).positions)


def test_a_picture_made_smaller_at_the_input_is_cut_again(small: Path, planned: Callable[..., Plan]) -> None:
    """Half the height and width, by antialiased interpolation, is what the model makes of such a picture."""
    plan = planned(DOWN, SIZES[:1])
    assert plan.vision[0].grid == (4, 6) and plan.vision[0].tokens == 6
    reference = Reference(small, plan)
    shot = picture(small, SIZES[0])
    got = ask(reference, [shot], [0], max_new_tokens=1)
    rows = shot.reshape(4, 6, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]  # blocks of 2x2 patches, the first of the equal frames
    raster = rows.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, 112, 168)
    shrunk = torch.nn.functional.interpolate(torch.from_numpy(raster)[None], (56, 84), mode="bilinear", antialias=True)[0]
    blocks = shrunk.numpy().reshape(3, 2, 2, 14, 3, 2, 14).transpose(1, 4, 2, 5, 0, 3, 6)
    patches = np.repeat(blocks[:, :, :, :, :, None], 2, axis=5).reshape(24, -1)
    with torch.no_grad():
        features = reference.model.whole.model.visual(torch.from_numpy(patches), grid_thw=torch.tensor([(1, 4, 6)])).pooler_output
    np.testing.assert_allclose(got.vision[0], features.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(got.positions, mrope_positions(np.array([0] * 3 + [1] * 6 + [0] * 3), [(1, 2, 3)]).positions)


def test_the_raster_is_the_picture(small: Path, planned: Callable[..., Plan]) -> None:
    reference = Reference(small, planned())
    tower = reference.model.tower
    assert isinstance(tower, QwenTower)
    files = read_model_files(small)
    rule = FAMILIES.get(str(files.config["model_type"])).image_rule(files, SIZES[0], None)
    image = load_image(np.random.default_rng(0).integers(0, 256, (*SIZES[0], 3)).astype(np.uint8))
    pixels = prepare(image, replace(rule, layout="pixels", patch=1, temporal_patch=1, merge=1))
    patches = torch.from_numpy(prepare(image, rule))[None]
    raster = tower.raster(patches, reference.plan.vision[0])
    np.testing.assert_array_equal(raster[0].numpy(), pixels)
    assert torch.equal(tower._cut(raster), patches)


def test_attention_weights_are_those_of_the_blocks(small: Path, planned: Callable[..., Plan]) -> None:
    reference = Reference(small, planned())
    tower, plan = reference.model.tower, reference.plan.vision[0]
    tokens = tower.embed(torch.from_numpy(picture(small, SIZES[0]))[None], plan)
    for layer in range(tower.layers):
        block = reference.model.whole.model.visual.blocks[layer]
        out, weights, _ = tower.attend(layer, tokens, None)
        value = block.attn.qkv(block.norm1(tokens[0])).unflatten(-1, (3, block.attn.num_heads, -1))[:, 2]
        mixed = torch.einsum("hqk,khd->qhd", weights[0], value).flatten(1)
        torch.testing.assert_close(tokens[0] + block.attn.proj(mixed), out[0], rtol=0, atol=1e-5)
        tokens = tower.feed_forward(layer, out)
    with pytest.raises(ExportError, match="cannot be cut before its merger"):
        tower.attend(0, tokens[:, 4:], None)


def test_a_shape_of_two_buckets_needs_the_bucket(small: Path, planned: Callable[..., Plan]) -> None:
    reference = Reference(small, planned())
    shot = picture(small, SIZES[0])
    with pytest.raises(RuntimeInputError, match=r"fits buckets \[0, 1\]; say which"):
        reference.visual_tokens([shot])
    assert reference.visual_tokens([shot], [1]) == [24]
    one, other = (ask(Reference(small, planned()), [shot], [b], max_new_tokens=1) for b in (0, 1))
    assert np.abs(one.logits - other.logits).max() > 1e-3, "rows and columns matter"


# --------------------------------------------------------------------------------------------------------------- bundles
def check_bundle(small: Path, tmp_path: Path, compress: str, sizes: tuple[tuple[int, int], ...]) -> None:
    from tmc_export.api.bundling import build_bundle
    from tmc_export.verify.ladder import climb

    result = build_bundle(write(small.parent, compress, sizes), tmp_path / "bundle")  # plays its own recordings, and raises
    assert result.manifest.proofs["onnxruntime end to end"].startswith("passed")
    ladder = climb(tmp_path / "bundle", small, steps=4)
    assert ladder.passed, ladder.text()
    assert [r.name for r in ladder.rungs if r.status == "not run"] == ["quantized", "TensorRT"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compress", "sizes"),
    [("", SIZES), (FASTV, SIZES), (FASTV, SIZES[:1]), (RANDOM, SIZES[:1]), (POOL, SIZES[:1]), (DOWN, SIZES[:1])],
)  # fmt: skip
def test_bundles_give_what_the_reference_gives(small: Path, tmp_path: Path, compress: str, sizes: tuple[tuple[int, int], ...]) -> None:
    check_bundle(small, tmp_path, compress, sizes)
