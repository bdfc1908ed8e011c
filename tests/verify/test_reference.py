"""The reference against Hugging Face, and against computations that are simpler still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.verify._prompts import Planner, Prompt, Prompter

torch = pytest.importorskip("torch")

from tmc_export.core.errors import ExportError, RuntimeInputError  # noqa: E402
from tmc_export.verify.reference import Reference  # noqa: E402

FASTV = "- {at: decoder.2, method: fastv, keep: 50%}"


@pytest.fixture(scope="module")
def hugging_face(model: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()


def generate(hugging_face: Any, prompt: Prompt, new_tokens: int = 12) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the raw logits of every step, by transformers' own `generate`."""
    pixels = {"pixel_values": torch.from_numpy(np.stack(prompt.pixels))} if prompt.pixels else {}
    ids = torch.from_numpy(prompt.input_ids)[None]
    out = hugging_face.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **pixels,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).numpy()


def turn(reference: Reference, prompt: Prompt, **options: Any) -> Any:
    return reference.turn(prompt.pixels, prompt.input_ids, prompt.group, **options)


# ------------------------------------------------------------------------------------------------------- no compression
PROMPTS = [
    ("what is at c4", ["scene-1.png"]),
    ("how many red things", ["scene-1.png"]),
    ("what colour is d3", ["scene-2.png"]),
    ("is there a yellow circle", ["scene-3.png"]),
    ("what is at b4", ["scene-2.png", "scene-4.png"]),
    ("what is at a1", []),
]


@pytest.mark.parametrize(("question", "pictures"), PROMPTS)
def test_empty_plan_is_hugging_face_generate(
    model: Path, planned: Planner, prompt: Prompter, hugging_face: Any, question: str, pictures: list[str]
) -> None:
    given = prompt(question, pictures)
    tokens, logits = generate(hugging_face, given)
    got = turn(Reference(model, planned(images=2)), given, max_new_tokens=12)
    assert list(got.tokens) == tokens
    np.testing.assert_allclose(got.logits, logits, rtol=0, atol=1e-5)
    assert got.stages == ()


def test_second_turn_is_hugging_face_on_the_whole_conversation(model: Path, planned: Planner, prompt: Prompter, hugging_face: Any) -> None:
    reference = Reference(model, planned(images=2))
    one = prompt("what is at c4", ["scene-1.png"])
    first = turn(reference, one, max_new_tokens=12)
    two = prompt("what colour is d3", ["scene-2.png"], first=False, carry=first.tokens[-1:])
    second = turn(reference, two, max_new_tokens=12)
    whole = Prompt(
        one.pixels + two.pixels,
        np.concatenate([one.input_ids, np.array(first.tokens[:-1], np.int64), two.input_ids]),
        np.zeros(0, np.int64),
    )
    tokens, logits = generate(hugging_face, whole)
    assert list(second.tokens) == tokens
    np.testing.assert_allclose(second.logits, logits, rtol=0, atol=1e-5)


def test_blocks_are_hugging_face_hidden_states(model: Path, planned: Planner, prompt: Prompter, hugging_face: Any) -> None:
    given = prompt("what is at c4", ["scene-1.png"])
    got = turn(Reference(model, planned(splits=[1, 3]), trace=True), given, max_new_tokens=1)
    ids = torch.from_numpy(given.input_ids)[None]
    with torch.no_grad():
        out = hugging_face(input_ids=ids, pixel_values=torch.from_numpy(np.stack(given.pixels)), output_hidden_states=True, use_cache=True)
    assert [(b.first, b.last) for b in got.blocks] == [(0, 1), (1, 3), (3, 4)]
    for block in got.blocks:
        np.testing.assert_allclose(block.hidden_in, out.hidden_states[block.first][0], rtol=0, atol=1e-5)
        for layer in range(block.first, block.last):
            np.testing.assert_allclose(block.keys[layer], out.past_key_values.layers[layer].keys[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got.blocks[0].positions, np.arange(len(given.input_ids))[None])


def test_sliding_windows_mask_what_lies_too_far_back(model: Path, planned: Planner, prompt: Prompter) -> None:
    from dataclasses import replace

    given = prompt("what is at c4", ["scene-1.png"])
    plan = planned()
    whole = turn(Reference(model, plan), given, max_new_tokens=2).logits
    wide = turn(Reference(model, replace(plan, windows=(len(given.input_ids) + 2,) * 4)), given, max_new_tokens=2).logits
    narrow = turn(Reference(model, replace(plan, windows=(32,) * 4)), given, max_new_tokens=2).logits
    np.testing.assert_array_equal(wide, whole)
    assert np.abs(narrow - whole).max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------- fastv
def masked_fastv(hugging_face: Any, given: Prompt, keep: int, forced: list[int]) -> tuple[list[list[int]], np.ndarray]:
    """FastV after layer 2 without a cache and without removing anything: from layer 2 on, no query sees the dropped keys."""
    model, text = hugging_face.model, hugging_face.model.language_model
    ids = torch.from_numpy(np.concatenate([given.input_ids, np.array(forced[:-1], np.int64)]))
    group = torch.from_numpy(given.group)
    prompt_length = len(given.input_ids)
    with torch.no_grad():
        hidden = text.embed_tokens(ids[None])
        features = model.get_image_features(pixel_values=torch.from_numpy(np.stack(given.pixels))).pooler_output
        for number, feature in enumerate(features, start=1):
            hidden[0, :prompt_length][group == number] = feature
        rotary = text.rotary_emb(hidden, torch.arange(len(ids))[None])
        mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
        kept: list[list[int]] = []
        scores = torch.empty(0)
        for layer, module in enumerate(text.layers):
            if layer == 2:
                for number in range(1, len(given.pixels) + 1):
                    mine = torch.nonzero(group == number)[:, 0]
                    best = scores[mine].argsort(descending=True, stable=True)[:keep].sort().values
                    kept.append(best.tolist())
                    gone = torch.ones(len(mine), dtype=torch.bool)
                    gone[best] = False
                    mask = mask.clone()
                    mask[..., mine[gone]] = float("-inf")
                mask[0, 0].fill_diagonal_(0)  # a dropped token still sees itself, so that its row is finite; nobody reads it
            _, weights = module.self_attn(hidden_states=module.input_layernorm(hidden), attention_mask=mask, position_embeddings=rotary)
            scores = weights[0, :, prompt_length - 1].mean(0)
            hidden = module(hidden, attention_mask=mask, position_embeddings=rotary)
        logits = hugging_face.lm_head(text.norm(hidden))[0, prompt_length - 1 :]
    return kept, logits.numpy()


@pytest.mark.parametrize(("question", "pictures"), [PROMPTS[0], PROMPTS[3], PROMPTS[4]])
def test_fastv_is_a_mask_from_its_layer_on(
    model: Path, planned: Planner, prompt: Prompter, hugging_face: Any, question: str, pictures: list[str]
) -> None:
    given = prompt(question, pictures)
    got = turn(Reference(model, planned(FASTV, images=2)), given, max_new_tokens=8)
    kept, logits = masked_fastv(hugging_face, given, 98, list(got.tokens))
    assert [s.kept.tolist() for s in got.stages] == kept
    np.testing.assert_allclose(got.logits, logits, rtol=0, atol=1e-5)
    assert got.greedy == got.tokens
    assert got.cache_rows[0] - got.cache_rows[2] == 98 * len(pictures)
    assert all(s.margin is not None and s.margin >= 0 for s in got.stages)
    plain, _ = generate(hugging_face, given, 1)
    assert np.abs(got.logits[0] - turn(Reference(model, planned(images=2)), given, max_new_tokens=1).logits[0]).max() > 1e-4, plain


def test_forced_tokens_are_fed_and_greedy_ones_reported(model: Path, planned: Planner, prompt: Prompter) -> None:
    given = prompt("what is at c4", ["scene-1.png"])
    free = turn(Reference(model, planned(FASTV)), given, max_new_tokens=4)
    same = turn(Reference(model, planned(FASTV)), given, forced=free.tokens)
    other = turn(Reference(model, planned(FASTV)), given, forced=[9, 9, 9])
    np.testing.assert_array_equal(same.logits, free.logits)
    assert other.tokens == (9, 9, 9) and other.logits.shape[0] == 3 and other.greedy[0] == free.tokens[0]
    assert np.abs(other.logits[1] - free.logits[1]).max() > 1e-2


# ---------------------------------------------------------------------------------------------------------------- turns
def test_frozen_turns_select_once_and_score_over_the_past(model: Path, planned: Planner, prompt: Prompter) -> None:
    reference = Reference(model, planned(FASTV, images=2))
    first = turn(reference, prompt("what is at c4", ["scene-1.png"]), max_new_tokens=4)
    rows = first.cache_rows
    text = turn(reference, prompt("how many squares", first=False, carry=first.tokens[-1:]), max_new_tokens=4)
    assert text.stages == () and text.cache_rows[0] - rows[0] == text.cache_rows[3] - rows[3]
    again = prompt("what colour is d3", ["scene-2.png"], first=False, carry=text.tokens[-1:])
    second = turn(reference, again, max_new_tokens=4)
    alone = turn(Reference(model, planned(FASTV, images=2)), again, max_new_tokens=4)
    assert len(second.stages) == 1
    assert second.stages[0].scores is not None and alone.stages[0].scores is not None
    assert second.stages[0].scores.sum() < alone.stages[0].scores.sum(), "the softmax runs over the past keys too"


def test_recomputed_turns_select_every_picture_anew(model: Path, planned: Planner, prompt: Prompter) -> None:
    reference = Reference(model, planned(FASTV, images=2, turns="recompute"))
    one = prompt("what is at c4", ["scene-1.png"])
    first = turn(reference, one, max_new_tokens=4)
    two = prompt("what colour is d3", ["scene-2.png"], first=False, carry=first.tokens[-1:])
    second = turn(reference, two, max_new_tokens=4)
    answer = np.array(first.tokens[:-1], np.int64)
    whole = Prompt(
        one.pixels + two.pixels,
        np.concatenate([one.input_ids, answer, two.input_ids]),
        np.concatenate([one.group, 0 * answer, np.where(two.group > 0, 2, 0)]),
    )
    expected = turn(Reference(model, planned(FASTV, images=2)), whole, max_new_tokens=4)
    assert second.tokens == expected.tokens
    np.testing.assert_array_equal(second.logits, expected.logits)
    assert len(second.stages) == 2


def test_renumbered_positions_close_the_gaps_and_go_on(model: Path, planned: Planner, prompt: Prompter) -> None:
    entries = [f"- {{at: decoder.{layer}, method: pyramiddrop, layers: [{layer}], keep: [50%]}}" for layer in (1, 2)]
    plan = planned("\n".join(entries), images=2)
    reference = Reference(model, plan, trace=True)
    first = turn(reference, prompt("what is at c4", ["scene-1.png"]), forced=[9, 9, 3])
    for block in first.blocks[1:]:
        np.testing.assert_array_equal(block.positions[0], np.arange(block.positions.shape[1]))
    assert [len(s.kept) for s in first.stages] == [98, 49]
    second = turn(reference, prompt("what colour is d3", ["scene-2.png"], first=False, carry=[3]), forced=[9])
    for before, after in zip(first.blocks, second.blocks, strict=True):
        assert after.positions[0, 0] == before.positions[0, -1] + 1 + 2, "two answer tokens were fed in between"


# ------------------------------------------------------------------------------------------------------------ every site
SITES = {
    "- {at: projector, method: pool, kernel: 2, mode: average}": 49,
    "- {at: encoder, method: visionzip, dominant: 54, contextual: 10}": 64,
    "- {at: encoder, method: tome, r: 16}": 132,
    "- {at: input, method: downsample, grid: [7, 7]}": 49,
    "- {at: projector, method: downsample, grid: [7, 7]}": 49,
    "- {at: projector, method: random, keep: 64}": 64,
}


@pytest.mark.parametrize("compress", SITES)
def test_vision_sites_give_the_planned_counts(model: Path, planned: Planner, prompt: Prompter, compress: str) -> None:
    plan = planned(compress)
    assert plan.vision[0].tokens == SITES[compress]
    got = turn(Reference(model, plan), prompt("what is at c4", ["scene-1.png"], tokens=SITES[compress]), max_new_tokens=3)
    assert got.vision[0].shape == (SITES[compress], 128)
    assert np.isfinite(got.logits).all() and len(got.stages) == len(plan.vision[0].stages)


def test_pooling_is_the_mean_of_hugging_face_features(model: Path, planned: Planner, prompt: Prompter, hugging_face: Any) -> None:
    given = prompt("what is at c4", ["scene-1.png"], tokens=49)
    got = turn(Reference(model, planned("- {at: projector, method: pool, kernel: 2, mode: average}")), given, max_new_tokens=1)
    features = hugging_face.model.get_image_features(pixel_values=torch.from_numpy(given.pixels[0])[None]).pooler_output[0]
    raster = features.detach().numpy().reshape(7, 2, 7, 2, 128).mean((1, 3)).reshape(49, 128)
    np.testing.assert_allclose(got.vision[0], raster, rtol=0, atol=1e-5)


def test_joint_budget_is_shared_and_padding_ranks_last(model: Path, planned: Planner, prompt: Prompter) -> None:
    plan = planned("- {at: decoder.2, method: fastv, keep: 50%, scope: joint}", images=2)
    both = turn(Reference(model, plan), prompt("what is at c4", ["scene-1.png", "scene-2.png"]), max_new_tokens=2)
    one = turn(Reference(model, plan), prompt("what is at c4", ["scene-1.png"]), max_new_tokens=2)
    assert [len(s.kept) for s in both.stages] == [196] and both.stages[0].kept.max() > 196
    assert one.stages[0].kept.tolist() == list(range(196)), "one picture of two: all of it fits the budget"


# --------------------------------------------------------------------------------------------------------------- refusal
def test_wrong_inputs_are_refused(model: Path, planned: Planner, prompt: Prompter) -> None:
    reference = Reference(model, planned(FASTV))
    given = prompt("what is at c4", ["scene-1.png"])
    short = np.array(given.group)
    short[np.flatnonzero(short)[-1]] = 0
    with pytest.raises(RuntimeInputError, match="196 visual tokens, its places in group are 195"):
        reference.turn(given.pixels, given.input_ids, short)
    with pytest.raises(RuntimeInputError, match="fits no bucket"):
        reference.turn([given.pixels[0][:, :56]], given.input_ids, given.group)
    with pytest.raises(RuntimeInputError, match="0 pictures were given"):
        reference.turn([], given.input_ids, given.group)


def test_a_stage_of_another_count_is_refused(model: Path, planned: Planner, prompt: Prompter) -> None:
    from dataclasses import replace

    plan = planned(FASTV)
    stage = plan.cuts[0].stages[0]
    wrong = replace(stage, before=replace(stage.before, segments=(replace(stage.before.segments[0], tokens=100),)))
    plan = replace(plan, cuts=(replace(plan.cuts[0], stages=(wrong,)),))
    with pytest.raises(ExportError, match="the plan says 100 candidates, 196 arrive"):
        turn(Reference(model, plan), prompt("what is at c4", ["scene-1.png"]))
