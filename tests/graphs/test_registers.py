"""VoCo, Victor, TCP-LLaVA and LLaMA-VID by hand: what is added, what is seen, what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.goldens.adapters._context import context as made
from tests.goldens.adapters._context import facts, layout
from tmc_export.graphs._contract import Context, Site
from tmc_export.graphs._synthetic import FACTS, context_for
from tmc_export.graphs.llama_vid import LlamaVid
from tmc_export.graphs.tcp_llava import TcpLlava
from tmc_export.graphs.victor import Victor
from tmc_export.graphs.voco import VoCo, phases, visible


# ----------------------------------------------------------------------------------------------------------------- VoCo
def _mask(row: list[int]) -> list[list[int]]:
    phase = phases(torch.tensor([row]).bool())
    return visible(phase.unsqueeze(2), phase.unsqueeze(1))[0].int().tolist()


def test_vocos_mask_by_hand() -> None:
    # picture, voco, picture, voco, text: all up to the last voco is phase 0 or 1 and sees itself; the text sees from the first voco on
    up_to, after = [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]
    assert _mask([0, 1, 0, 1, 0]) == [up_to, up_to, up_to, up_to, after]
    # text that comes first (a system prompt) is as invisible to the text behind as the picture
    assert _mask([0, 0, 1, 0])[3] == [0, 0, 1, 1]
    assert _mask([0, 0, 0]) == [[1, 1, 1]] * 3
    assert _mask([0, 0, 1, 0])[3] != [1, 1, 1, 1]


def test_voco_repeats_one_embedding_behind_the_picture() -> None:
    config = VoCo.Config(count=3)
    stage, tokens, context = context_for(VoCo, config, "projector", batch=2)
    valid = context.valid.clone()
    valid[1] = False  # a picture that is not there
    out = VoCo.apply(stage, tokens, replace(context, valid=valid), config)
    assert torch.equal(out.tokens[:, :64], tokens)
    assert torch.equal(out.tokens[:, 64:], context.weights["voco.weight"].expand(2, 3, -1))
    assert out.source[0].tolist() == [*range(64), -1, -1, -1]
    assert out.valid[:, 64:].tolist() == [[True] * 3, [False] * 3]


# --------------------------------------------------------------------------------------------------------------- Victor
def test_victors_registers_follow_the_picture_and_alone_stay() -> None:
    config = Victor.Config(registers=2, layer=3)
    first, second = Victor.stages(Site.parse("projector"), config, FACTS)
    assert (str(first.at), str(second.at)) == ("projector", "decoder.3")
    stage, tokens, context = context_for(Victor, config, "projector")
    grown = Victor.apply(stage, tokens, context, config)
    assert torch.equal(grown.tokens[0, 64:], context.weights["registers"])
    assert torch.equal(grown.tokens[:, :64], tokens)
    stage, tokens, context = context_for(Victor, config, "projector", index=1)
    kept = Victor.apply(stage, tokens, context, config)
    assert kept.source.tolist() == [[64, 65]]
    assert torch.equal(kept.tokens, tokens[:, 64:]) and not torch.equal(kept.tokens, tokens[:, :2])
    after = Victor.layout(stage, context.layout, config, FACTS)
    assert (after.tokens, after.positions) == (2, "keep")


def test_victor_refuses_a_layer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="layer: 28 .* has 28; lower layer to at most 27"):
        Victor.stages(Site.parse("projector"), Victor.Config(layer=28), FACTS)


# ------------------------------------------------------------------------------------------------------------ TCP-LLaVA
def _tcp(feed_forward: float = 0.0) -> tuple[Tensor, Context]:
    """Three visual tokens and two words of two channels; a module of one layer and one head, queries zero, values the tokens themselves."""
    one, zero = torch.eye(2), torch.zeros(2)
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [40.0, 40.0]]])
    weights = {"compression_tokens": torch.tensor([[3.0, 1.0]])}
    for part in ("query", "key", "value"):
        name = f"layers.0.attention.attention.{part}"
        weights |= {f"{name}.weight": one if part == "value" else 0 * one, f"{name}.bias": zero}
    weights |= {"layers.0.attention.output.dense.weight": one, "layers.0.attention.output.dense.bias": zero}
    weights |= {f"layers.0.attention.output.LayerNorm.{p}": v for p, v in (("weight", zero + 1), ("bias", zero))}
    weights |= {"layers.0.intermediate.dense.weight": one, "layers.0.intermediate.dense.bias": zero}
    weights |= {"layers.0.output.dense.weight": feed_forward * one, "layers.0.output.dense.bias": zero}
    weights |= {"layers.0.output.LayerNorm.weight": zero + 2, "layers.0.output.LayerNorm.bias": zero + 5}
    here = made(tokens, layout(3, 2), facts())
    text = torch.tensor([[[2.0, 3.0], [90.0, -90.0]]])
    valid = torch.tensor([[True, True, False]])
    return tokens, replace(here, text=text, text_valid=torch.tensor([[True, False]]), valid=valid, weights=weights)


def test_tcp_llava_by_hand() -> None:
    # Queries are zero, so the compression token takes the mean of what it sees: itself (3, 1), (1, 0), (0, 2) and the word (2, 3), not the
    # padding (40, 40) and (90, -90): (6, 6) / 4 = (1.5, 1.5). Plus itself (4.5, 2.5), normed: (1, -1). The feed-forward part is zero, so
    # its norm with weight 2 and bias 5 makes (7, 3).
    config = TcpLlava.Config(tokens=1, layers=1, heads=1, intermediate=2)
    (stage,) = TcpLlava.stages(Site.parse("decoder.0"), config, facts())
    tokens, context = _tcp()
    out = TcpLlava.apply(stage, tokens, context, config)
    torch.testing.assert_close(out.tokens, torch.tensor([[[7.0, 3.0]]]))
    assert (out.source.tolist(), out.valid.tolist(), out.text) == ([[0]], [[True]], None)
    # were the padded word seen, the mean would be (96, -84) / 5 and the normed sum still (1, -1): move it to tell
    seen = replace(context, text=torch.tensor([[[2.0, 3.0], [-90.0, 90.0]]]), text_valid=torch.tensor([[True, True]]))
    torch.testing.assert_close(TcpLlava.apply(stage, tokens, seen, config).tokens, torch.tensor([[[3.0, 7.0]]]))


def test_tcp_llavas_feed_forward_part_by_hand() -> None:
    # As above up to (1, -1); gelu(1) = 0.8413447, gelu(-1) = -0.1586553; minus ten times that, plus (1, -1): (-7.413447, 0.586553), whose
    # norm is (-1, 1): times 2 plus 5 is (3, 7).
    config = TcpLlava.Config(tokens=1, layers=1, heads=1, intermediate=2)
    (stage,) = TcpLlava.stages(Site.parse("decoder.0"), config, facts())
    tokens, context = _tcp(feed_forward=-10.0)
    torch.testing.assert_close(TcpLlava.apply(stage, tokens, context, config).tokens, torch.tensor([[[3.0, 7.0]]]))


def test_tcp_llava_renumbers_and_works_on_embeddings_only() -> None:
    config = TcpLlava.Config(tokens=8)
    (stage,) = TcpLlava.stages(Site.parse("decoder.0"), config, FACTS)
    assert TcpLlava.layout(stage, layout(64, 96), config, FACTS).positions == "renumber"
    with pytest.raises(ValueError, match="not at decoder.2; write at: decoder.0"):
        TcpLlava.stages(Site.parse("decoder.2"), config, FACTS)


# ------------------------------------------------------------------------------------------------------------ LLaMA-VID
def test_llama_vid_by_hand_with_padding() -> None:
    # 2 x 2 patches of one channel: 1, 3, 5, padding. A zero query reads their mean, 3; a query of logits (0, 2, 4) * ln 2 weighs them
    # 1 : 4 : 16, (1 + 12 + 80) / 21 = 93 / 21. The mean of both queries: (3 + 93 / 21) / 2; a padded word has no say. The content is the
    # mean of the valid patches, 3.
    config, model = LlamaVid.Config(projector="linear"), facts()
    first, second = LlamaVid.stages(Site.parse("projector.replace"), config, model)
    tokens, one = torch.tensor([[[1.0], [3.0], [5.0], [1000.0]]]), torch.ones(1, 1)
    names = ("vlm_att_projector", "vlm_att_key_projector", "vlm_att_val_projector", "mm_projector")
    here = made(tokens, layout(4, 1, grid=(2, 2)), model)
    here = replace(
        here,
        valid=torch.tensor([[True, True, True, False]]),
        text=torch.tensor([[[0.0], [0.6931472], [77.0]]]),
        text_valid=torch.tensor([[True, True, False]]),
        weights={f"{name}.weight": one for name in names},
    )
    content = LlamaVid.apply(first, tokens, here, config)
    torch.testing.assert_close(content.tokens, torch.tensor([[[0.0], [3.0]]]))
    assert content.valid.tolist() == [[True, True]] and content.assign is not None and content.assign.tolist() == [[1, 1, 1, 1]]
    later = replace(here, layout=layout(2, 1), valid=content.valid, state=content.state)
    out = LlamaVid.apply(second, content.tokens, later, config)
    torch.testing.assert_close(out.tokens, torch.tensor([[[(3 + 93 / 21) / 2], [3.0]]]))
    assert out.source.tolist() == [[0, 1]]
    loud = replace(later, text_valid=torch.ones(1, 3, dtype=torch.bool))
    assert not torch.allclose(LlamaVid.apply(second, content.tokens, loud, config).tokens, out.tokens)


def test_llama_vids_windows_are_the_official_count() -> None:
    # 14 over 6: windows of 2, so 7 a side and 49 content tokens, not 36; 14 over 4: windows of 3, 4 a side, two rows and columns left out
    model = facts()
    for grid, side in ((6, 7), (4, 4)):
        config = LlamaVid.Config(grid=grid)
        stage = LlamaVid.stages(Site.parse("projector.replace"), config, model)[0]
        assert LlamaVid.layout(stage, layout(196, 8, grid=(14, 14)), config, model).tokens == 1 + side * side
