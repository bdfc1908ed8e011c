"""Choices of stages held: what is recognised as a choice, and that tokens come from the candidates as they are now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Compressed, Site
from tmc_export.surgery.replay import Choices, choose, replaying, round_slots, rounded_slots, writing_down

PLAN: Any = SimpleNamespace(method="made", entry=0, stage=SimpleNamespace(at=Site.parse("decoder.1"), index=0))


def largest(tokens: Tensor) -> Compressed:
    """Keep the two candidates of the largest first channel."""
    index = tokens[:, :, 0].topk(2).indices.sort(1).values
    return Compressed(tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2])), index, torch.ones(1, 2, dtype=torch.bool))


def mean(tokens: Tensor) -> Compressed:
    """The largest candidate, and the mean of the others."""
    best = tokens[:, :, 0].argmax(1)
    one = torch.nn.functional.one_hot(best, tokens.shape[1]).float()
    mix = torch.stack([one, (1 - one) / (tokens.shape[1] - 1)], 1)
    source = torch.stack([best, torch.full_like(best, -1)], 1)
    return Compressed(mix @ tokens, source, torch.ones(1, 2, dtype=torch.bool), mix=mix)


def peak(tokens: Tensor) -> Compressed:
    """The largest number of each channel: no linear map."""
    return Compressed(tokens.amax(1, keepdim=True), torch.tensor([[-1]]), torch.ones(1, 1, dtype=torch.bool))


BEFORE = torch.tensor([[[1.0, 5.0], [3.0, 6.0], [2.0, 7.0]]])
NOW = torch.tensor([[[9.0, 1.0], [3.0, 2.0], [2.0, 3.0]]])


@pytest.mark.parametrize(("method", "kind", "want"), [
    (largest, "rows", [[3.0, 2.0], [2.0, 3.0]]), (mean, "mix", [[3.0, 2.0], [5.5, 2.0]]), (peak, "none", [[9.0, 3.0]]),
])  # fmt: skip
def test_a_choice_is_repeated_on_other_tokens(method: Any, kind: str, want: list[list[float]]) -> None:
    choices = Choices()
    with writing_down(choices):
        made = choose(PLAN, BEFORE, lambda: method(BEFORE))
    assert list(choices.kinds.values()) == [kind] and choices.plain == (kind == "rows")
    with replaying(choices):
        held = choose(PLAN, NOW, lambda: method(NOW))
    assert torch.allclose(held.tokens[0], torch.tensor(want)) and torch.equal(held.source, made.source)
    free = choose(PLAN, NOW, lambda: method(NOW))
    assert torch.equal(free.tokens, held.tokens) == (kind == "none")  # the twin: the method itself chooses otherwise now


def test_a_selection_whose_tokens_are_changed_is_no_selection() -> None:
    choices = Choices()
    with writing_down(choices):
        choose(PLAN, BEFORE, lambda: Compressed(largest(BEFORE).tokens * 2, largest(BEFORE).source, torch.ones(1, 2, dtype=torch.bool)))
    assert list(choices.kinds.values()) == ["none"]


def test_calls_are_repeated_in_their_order_and_no_more_of_them() -> None:
    choices = Choices()
    with writing_down(choices):
        for tokens in (BEFORE, NOW):
            choose(PLAN, tokens, lambda tokens=tokens: largest(tokens))  # type: ignore[misc]
    with replaying(choices) as again:
        assert [choose(PLAN, BEFORE, lambda: peak(BEFORE)).source[0].tolist() for _ in range(2)] == [[1, 2], [0, 1]]
        with pytest.raises(ExportError, match="made 2 calls, this is one more"):
            choose(PLAN, BEFORE, lambda: largest(BEFORE))
        again()
        assert choose(PLAN, BEFORE, lambda: peak(BEFORE)).source[0].tolist() == [1, 2]


def test_slots_are_rounded_inside_the_context_only() -> None:
    key, value = torch.full((1, 1, 1, 2), 0.3), torch.full((1, 1, 1, 2), 0.7)
    with rounded_slots(lambda layer, k, v: (k.round() + layer, v.round())):
        assert round_slots(4, key, value)[0].unique().tolist() == [4.0] and round_slots(0, key, value)[1].unique().tolist() == [1.0]
    assert round_slots(4, key, value)[0] is key
