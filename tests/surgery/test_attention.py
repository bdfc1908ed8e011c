"""The static attention: its mask against a loop, its head expansion, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tmc_export.core.errors import ExportError
from tmc_export.surgery.attention import MASKED, AttentionState, additive_mask, expand_heads, recording
from tmc_export.surgery.attention import static_attention as attention


@pytest.mark.parametrize("window", [None, 3])
def test_mask_equals_a_loop(window: int | None) -> None:
    torch.manual_seed(0)
    query_order, key_order = torch.tensor([[4, 5, -1]]), torch.tensor([[0, 2, 3, 4, 5, 9]])
    valid = torch.tensor([[True, True, False, True, True, True]])
    mask = additive_mask(query_order, key_order, valid, window, torch.float32)
    assert mask.shape == (1, 1, 3, 6)
    for row, q in enumerate(query_order[0].tolist()):
        for column, k in enumerate(key_order[0].tolist()):
            seen = bool(valid[0, column]) and k <= q and (window is None or q - k < window)
            assert mask[0, 0, row, column].item() == (0.0 if seen else MASKED)


def test_masked_scores_stay_finite_in_float16() -> None:
    mask = additive_mask(torch.tensor([[-1]]), torch.tensor([[0, 1]]), torch.tensor([[True, True]]), None, torch.float16)
    assert torch.isfinite(mask).all()
    assert torch.isfinite((mask + 100).softmax(-1)).all()


def test_heads_are_repeated_group_by_group() -> None:
    tensor = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(1, 2, 3, 4)
    expanded = expand_heads(tensor, 6)
    assert torch.equal(expanded, tensor.repeat_interleave(3, dim=1))
    assert expand_heads(tensor, 2) is tensor


def _operands(past: int, new: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    shapes = [(1, 4, new, 8), (1, 2, new, 8), (1, 2, new, 8), (1, 2, past, 8), (1, 2, past, 8)]
    return tuple(torch.randn(s) for s in shapes)


@pytest.mark.parametrize("past", [0, 5])
def test_equals_scaled_dot_product_attention(past: int) -> None:
    query, key, value, past_key, past_value = _operands(past, 3)
    order = torch.arange(past + 3)[None]
    mask = additive_mask(order[:, past:], order, torch.ones(1, past + 3, dtype=torch.bool), None, torch.float32)
    state = AttentionState(past={7: (past_key, past_value)}, masks={7: mask}, wanted={7: "last"}, last=torch.tensor([2]))
    module = SimpleNamespace(layer_idx=7, head_dim=8)
    with recording(state):
        got, weights = attention(module, query, key, value, None, scaling=0.3)
    keys, values = torch.cat([past_key, key], 2).repeat_interleave(2, 1), torch.cat([past_value, value], 2).repeat_interleave(2, 1)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask == 0, scale=0.3)
    torch.testing.assert_close(got, wanted.transpose(1, 2), atol=1e-6, rtol=1e-5)
    assert weights is None
    assert torch.equal(state.keys[7], key) and torch.equal(state.values[7], value)
    torch.testing.assert_close(state.queries[7], query[:, :, 2:] * 0.3)
    with pytest.raises(AssertionError):  # the twin: a mask that shows the future
        with recording(AttentionState(past={7: (past_key, past_value)}, masks={7: torch.zeros_like(mask)})):
            torch.testing.assert_close(attention(module, query, key, value, None, scaling=0.3)[0], wanted.transpose(1, 2))


def test_outside_of_a_subgraph_it_says_so() -> None:
    query, key, value, *_ = _operands(0, 2)
    with pytest.raises(ExportError, match="outside of a subgraph"):
        attention(SimpleNamespace(layer_idx=0, head_dim=8), query, key, value, None)


def test_softcap_is_refused() -> None:
    query, key, value, *_ = _operands(0, 2)
    with recording(AttentionState(past={}, masks={})), pytest.raises(ExportError, match="softcap=30"):
        attention(SimpleNamespace(layer_idx=0, head_dim=8), query, key, value, None, softcap=30)
