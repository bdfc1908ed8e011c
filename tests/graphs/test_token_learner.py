"""TokenLearner on numbers worked out by hand; the official code is JAX, and no golden of it exists."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tmc_export.graphs._contract import Compressed, Context, Layout, Segment, Site, Stage
from tmc_export.graphs._synthetic import FACTS
from tmc_export.graphs.token_learner import TokenLearner

STAGE = Stage(Site.parse("encoder"))


def _apply(tokens: Tensor, weights: Mapping[str, Tensor], valid: Tensor | None = None, first: int = 0) -> Compressed:
    n, c = tokens.shape
    visual = Segment("visual", n - first)
    layout = Layout((Segment("class", first), visual) if first else (visual,), c)
    seen = torch.ones(1, n, dtype=torch.bool) if valid is None else valid
    context = Context(layout, FACTS, seen, torch.arange(n).unsqueeze(0), weights=weights)
    learned = weights["token_masking.Dense_1.bias"].shape[0]
    return TokenLearner.apply(STAGE, tokens.unsqueeze(0), context, TokenLearner.Config(tokens=learned, channels=c))


def _weights(kernel_0: list[list[float]], bias_0: list[float], kernel_1: list[list[float]], bias_1: list[float]) -> dict[str, Tensor]:
    return {
        "LayerNorm_0.scale": torch.ones(len(kernel_0)),
        "LayerNorm_0.bias": torch.zeros(len(kernel_0)),
        "token_masking.Dense_0.kernel": torch.tensor(kernel_0),
        "token_masking.Dense_0.bias": torch.tensor(bias_0),
        "token_masking.Dense_1.kernel": torch.tensor(kernel_1),
        "token_masking.Dense_1.bias": torch.tensor(bias_1),
    }


# Two channels, so a layer norm leaves (1, -1) where the first is larger and (-1, 1) where it is smaller. The first layer takes 10 times the
# first channel: gelu(10) = 10 for the one, gelu(-10) = 0 for the other. The second layer makes of it ln 3 and 0 for the first learned token
# (weights 3/4 and 1/4), and the same 0.7 for the second (weights 1/2 and 1/2).
_TOKENS = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
_HAND = _weights([[10.0], [0.0]], [0.0], [[math.log(3.0) / 10.0, 0.0]], [5.0, 0.7])


def test_two_tokens_by_hand() -> None:
    out = _apply(_TOKENS, _HAND)
    # 3/4 (3, 1) + 1/4 (1, 3) = (2.5, 1.5); 1/2 (3, 1) + 1/2 (1, 3) = (2, 2). The biases 5 and 0.7 are the same for every token and cancel.
    # eps 1e-6 makes the norm 1 - 5e-7, so the weights are off by less than 1e-5.
    assert torch.allclose(out.tokens[0], torch.tensor([[2.5, 1.5], [2.0, 2.0]]), atol=1e-5)
    assert out.mix is not None
    assert torch.allclose(out.mix[0], torch.tensor([[0.75, 0.25], [0.5, 0.5]]), atol=1e-5)
    assert out.source.tolist() == [[-1, -1]]
    assert out.valid.tolist() == [[True, True]]


def test_another_weight_gives_another_token() -> None:
    """The negative twin: the weight decides."""
    changed = {**_HAND, "token_masking.Dense_1.kernel": _HAND["token_masking.Dense_1.kernel"] * 1.01}
    assert not torch.allclose(_apply(_TOKENS, changed).tokens[0], torch.tensor([[2.5, 1.5], [2.0, 2.0]]), atol=1e-3)


def test_gelu_is_the_tanh_form() -> None:
    """One learned token, scores gelu(2) and gelu(0) = 0: the first token has the weight 1 / (1 + exp(-gelu(2)))."""
    tokens = torch.tensor([[2000.0, 0.0], [0.0, 2000.0]])
    out = _apply(tokens, _weights([[1.0], [0.0]], [1.0], [[1.0]], [0.0])).tokens[0, 0, 0].item()
    tanh = 0.5 * 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 2**3)))
    erf = 0.5 * 2 * (1 + math.erf(2 / math.sqrt(2)))
    want, other = (2000 / (1 + math.exp(-gelu)) for gelu in (tanh, erf))
    # float32 at 2000 has steps of 1e-4; the two forms are 0.02 apart
    assert abs(out - want) < 2e-3 < abs(want - other) / 4


def test_padding_has_no_weight_and_the_class_token_passes() -> None:
    tokens = torch.tensor([[9.0, 9.0], [3.0, 1.0], [1.0, 3.0], [50.0, -50.0]])
    out = _apply(tokens, _HAND, valid=torch.tensor([[True, True, True, False]]), first=1)
    assert torch.allclose(out.tokens[0], torch.tensor([[9.0, 9.0], [2.5, 1.5], [2.0, 2.0]]), atol=1e-5)
    assert out.source.tolist() == [[0, -1, -1]]
    assert out.mix is not None
    assert out.mix[0, :, 3].tolist() == [0.0, 0.0, 0.0]
    empty = _apply(tokens, _HAND, valid=torch.tensor([[True, False, False, False]]), first=1)
    assert empty.valid.tolist() == [[True, False, False]]


def test_weights_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="write channels: 96"):
        TokenLearner.stages(Site.parse("projector"), TokenLearner.Config(), FACTS)
    assert TokenLearner.stages(Site.parse("projector"), TokenLearner.Config(channels=96), FACTS)


def test_an_encoder_whose_projector_joins_patches_is_refused() -> None:
    joining = replace(FACTS, encoder=replace(FACTS.encoder, merge=2))
    with pytest.raises(ValueError, match="2x2 groups"):
        TokenLearner.stages(Site.parse("encoder"), TokenLearner.Config(), joining)
