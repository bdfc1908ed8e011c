"""The compress module in eager mode against plain Python: which tokens stay, in which order, with padding, two pictures and a past."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tmc_export.core.facts import DecoderFacts, EncoderFacts, ModelFacts
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Attention, Layout, Segment, Site, Stage
from tmc_export.plan.types import CutPlan, StagePlan
from tmc_export.surgery.cut import Cut

WIDTH, HEADS, GROUPS, HEAD = 16, 4, 2, 8
FACTS = ModelFacts(
    "llava",
    "LlavaForConditionalGeneration",
    EncoderFacts(2, WIDTH, 2, 32, 8, 1, 1, (2, 3)),
    DecoderFacts(4, WIDTH, HEADS, GROUPS, HEAD, 32, 100, 1, True, 512),
    (2, 3),
    4,
)


class _Parts:
    """A decoder of which only the number of layers matters here."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList(nn.Identity() for _ in range(4))


def _cut(images: int, keep: int, size: int = 24, scope: str = "image") -> Cut:
    method = METHODS.get("fastv")
    config = method.Config.model_validate({"keep": keep})
    (stage,) = method.stages(Site.parse("decoder.2"), config, FACTS)
    each = 6 if scope == "image" else 6 * images
    layout = Layout((Segment("visual", each),), WIDTH)
    after = method.layout(stage, layout, config, FACTS)
    planned = StagePlan(0, "fastv", config, stage, layout, after, scope)  # type: ignore[arg-type]
    kept = after.tokens * (images if scope == "image" else 1)
    plan = CutPlan(1, 2, (planned,), size, size - 6 * images + kept, 6 * images, kept, "keep")
    parts: Any = _Parts()
    return Cut(parts, plan, images, FACTS, (None,) * 4)


def _run(
    cut: Cut, group: list[int], past: int = 0, seed: int = 0, capacity: int = 40
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Feed a turn behind `past` older slots; returns the feed and the outputs, by name."""
    torch.manual_seed(seed)
    size, count, pictures = cut.plan.tokens_in, len(group), cut.images
    hidden, query = torch.randn(1, size, WIDTH), torch.randn(1, HEADS, 1, HEAD)
    keys, older = torch.randn(1, GROUPS, size, HEAD), torch.randn(1, GROUPS, 16, HEAD)
    key = torch.full((1, GROUPS, capacity, HEAD), 50.0)  # what lies in unused slots must not matter
    key[:, :, :past], key[:, :, past : past + count] = older[:, :, :past], keys[:, :, :count]
    slot_order, slot_valid = torch.zeros(1, capacity, dtype=torch.long), torch.zeros(1, capacity, dtype=torch.bool)
    slot_order[0, : past + count], slot_valid[0, : past + count] = torch.arange(past + count), True
    places, alive = torch.zeros(pictures, 6, dtype=torch.long), torch.zeros(pictures, 6, dtype=torch.bool)
    for picture in range(pictures):
        found = [i for i, g in enumerate(group) if g == picture + 1]
        places[picture, : len(found)], alive[picture, : len(found)] = torch.tensor(found, dtype=torch.long), True

    def padded(values: list[int], fill: int = 0) -> torch.Tensor:
        return torch.tensor([values + [fill] * (size - count)])

    order = padded(list(range(past, past + count)), -1)
    feed = {
        "hidden": hidden,
        "positions": order.clamp(min=0)[None],
        "order": order,
        "valid": torch.arange(size)[None] < count,
        "group": padded(group),
        "candidates": places.reshape(1, -1),
        "candidate_valid": alive.reshape(1, -1),
        "last": torch.tensor([count - 1]),
        "slots": padded(list(range(past, past + count))),
        "slot_order": slot_order,
        "slot_valid": slot_valid,
        "query.1": query,
        "key.1": key,
    }
    outputs = cut(*[feed[name] for name in cut.input_names()])
    return feed, dict(zip(cut.output_names(), outputs, strict=True))


def _expected(feed: dict[str, torch.Tensor], group: list[int], keep: int, past: int, joint: bool = False) -> list[int]:
    """Places of the turn that stay: text, and per picture the `keep` best by mean attention of the last row; ties to the lowest place."""
    count = len(group)
    keys = feed["key.1"][:, :, : past + count].repeat_interleave(HEADS // GROUPS, 1)
    weights = (feed["query.1"] @ keys.transpose(-1, -2)).softmax(-1).mean(1)[0, 0, past:]
    stay = [i for i, g in enumerate(group) if g == 0]
    for picture in [None] if joint else sorted({g for g in group if g}):
        found = [i for i, g in enumerate(group) if g and (joint or g == picture)]
        stay += sorted(found, key=lambda i: (-weights[i].item(), i))[:keep]
    return sorted(stay)


ONE = [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]
TWO = [0, 1, 1, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0, 0]


@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize(("images", "group", "keep"), [(1, ONE, 3), (2, TWO, 2), (2, ONE, 4)])
def test_keeps_what_plain_python_keeps(images: int, group: list[int], keep: int, past: int) -> None:
    cut = _cut(images, keep)
    feed, out = _run(cut, group, past)
    wanted = _expected(feed, group, keep, past)
    left = int(out["valid_out"].sum())
    assert out["source"][0, :left].tolist() == wanted
    assert torch.equal(out["hidden_out"][0, :left], feed["hidden"][0, wanted])
    assert not out["hidden_out"][0, left:].any()
    other = _expected(feed | {"query.1": -feed["query.1"]}, group, keep, past)
    assert other != wanted, "the twin: another query must keep other tokens, or this test proves nothing"


def test_a_joint_budget_is_shared_by_the_pictures() -> None:
    cut = _cut(2, 4, scope="joint")
    feed, out = _run(cut, TWO)
    left = int(out["valid_out"].sum())
    assert out["source"][0, :left].tolist() == _expected(feed, TWO, 4, 0, joint=True)


def test_what_stays_depends_on_neither_bucket_nor_capacity() -> None:
    small = _run(_cut(1, 3, size=12), ONE, capacity=20)[0]
    for size, capacity in [(24, 40), (40, 64)]:
        cut = _cut(1, 3, size=size)
        feed, out = _run(cut, ONE, capacity=capacity)
        count = len(ONE)
        for name in ("query.1",):
            feed[name] = small[name]
        feed["key.1"][:, :, :count] = small["key.1"][:, :, :count]
        again = dict(zip(cut.output_names(), cut(*[feed[n] for n in cut.input_names()]), strict=True))
        assert again["kept.0"][0].tolist() == _kept(_cut(1, 3, size=12), small)


def _kept(cut: Cut, feed: dict[str, torch.Tensor]) -> list[int]:
    out = dict(zip(cut.output_names(), cut(*[feed[n] for n in cut.input_names()]), strict=True))
    kept: list[int] = out["kept.0"][0].tolist()
    return kept


def test_a_missing_picture_is_reported_as_nothing_kept() -> None:
    _, out = _run(_cut(2, 2), ONE)
    assert out["kept.0"][0, 2:].tolist() == [-1, -1]


def test_the_stage_needs_one_row_of_the_layer_before() -> None:
    cut = _cut(1, 3)
    assert cut.previous == (Attention("previous", "last", "mean"),)
    assert isinstance(cut.plan.stages[0].stage, Stage)


@pytest.mark.parametrize("group", [TWO, ONE, ONE[2:]], ids=["two pictures", "one of two", "one of two, first in the turn"])
def test_retroactive_kv_keeps_the_text_and_the_chosen_candidates_of_every_picture(group: list[int]) -> None:
    """`kv.<l>` marks the turn's text and the kept tokens, also where the bucket has room for a picture that was not given."""
    method = METHODS.get("tokencarve")
    config = method.Config.model_validate({"keep": 2, "scores": "attention"})
    (stage,) = method.stages(Site.parse("decoder.2"), config, FACTS)
    layout = Layout((Segment("visual", 6),), WIDTH)
    planned = StagePlan(0, "tokencarve", config, stage, layout, method.layout(stage, layout, config, FACTS), "image")
    parts: Any = _Parts()
    cut = Cut(parts, CutPlan(1, 2, (planned,), 24, 16, 12, 4, "keep"), 2, FACTS, (None,) * 4)
    _, out = _run(cut, group)
    left = int(out["valid_out"].sum())
    for layer in (0, 1):
        assert torch.nonzero(out[f"kv.{layer}"][0])[:, 0].tolist() == out["source"][0, :left].tolist()
    kept = [i for i in out["kept.0"][0].tolist() if i >= 0]
    assert len(kept) == 2 * max(group) and left == len(kept) + group.count(0)
