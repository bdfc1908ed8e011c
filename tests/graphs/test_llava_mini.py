"""LLaVA-Mini's pre-fusion, which no golden covers: against Hugging Face's Llama layers, unpadded; and what the two cuts hand on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tmc_export.graphs._contract import Context, Site, Stage
from tmc_export.graphs._synthetic import FACTS, context_for
from tmc_export.graphs.llava_mini import LlavaMini, rope_frequencies

CONFIG = LlavaMini.Config(grid=2, heads=4, prefusion=2)
# two layers of float32 sums in another order, of values of size 1
CLOSE = {"atol": 3e-5, "rtol": 3e-5}


def _fusion(config: LlavaMini.Config = CONFIG) -> tuple[Stage, Tensor, Context]:
    stage, tokens, context = context_for(LlavaMini, config, "encoder", index=1, batch=1, seed=1)
    return stage, tokens, replace(context, weights={name: value * 2 for name, value in context.weights.items()})


def _official(x: Tensor, context: Context, config: LlavaMini.Config) -> Tensor:
    """Hugging Face's layers, causal, over a sequence without padding."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    d = FACTS.decoder
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3"} | dict(zip(names, config.rope_scaling, strict=True))
    llama = LlamaConfig(
        hidden_size=d.width,
        intermediate_size=d.intermediate,
        num_attention_heads=d.heads,
        num_key_value_heads=d.kv_heads,
        head_dim=d.head_dim,
        num_hidden_layers=config.prefusion,
        rms_norm_eps=config.rms_eps,
        rope_parameters=rope,
        attn_implementation="eager",
        max_position_embeddings=131072,
    )
    t = x.shape[1]
    places = torch.arange(t).unsqueeze(0)
    mask = torch.full((t, t), -1e30).triu(1).reshape(1, 1, t, t)
    turn = LlamaRotaryEmbedding(llama)(x, places)
    for i in range(config.prefusion):
        layer = LlamaDecoderLayer(llama, i).eval()
        prefix = f"prefusion_layers.{i}."
        layer.load_state_dict({name.removeprefix(prefix): v for name, v in context.weights.items() if name.startswith(prefix)})
        out = layer(x, attention_mask=mask, position_ids=places, position_embeddings=turn)
        x = out[0] if isinstance(out, tuple) else out
    return x


@pytest.mark.parametrize("scaling", [None, (8.0, 1.0, 4.0, 64.0)])
@torch.no_grad()
def test_fusion_equals_llama_layers_without_the_padding(scaling: tuple[float, float, float, float] | None) -> None:
    config = CONFIG.model_copy(update={"rope_theta": 500.0, "rope_scaling": scaling})
    stage, tokens, context = _fusion(config)
    assert context.text is not None and context.text_valid is not None
    n, m = tokens.shape[1], context.text.shape[1]
    valid, words = context.valid.clone(), context.text_valid.clone()
    valid[:, 3:9], words[:, 2] = False, False
    out = LlavaMini.apply(stage, tokens, replace(context, valid=valid, text_valid=words), config)
    everything = torch.cat([valid, words], dim=1)[0]
    want = _official(torch.cat([tokens, context.text], dim=1)[:, everything], context, config)
    assert out.text is not None
    said = int(words.sum())
    assert 0 < said < m - 1  # the made-up text is padded, too
    torch.testing.assert_close(out.text[:, words[0]], want[:, -said:], **CLOSE)
    torch.testing.assert_close(out.tokens, want[:, -said - 4 : -said], **CLOSE)
    assert torch.equal(out.text[:, 2], context.text[:, 2])  # a padded word keeps its embedding
    assert out.source.tolist() == [[n - 4, n - 3, n - 2, n - 1]]
    unscaled = config.model_copy(update={"rope_theta": 10000.0, "rope_scaling": None})
    assert not torch.allclose(
        LlavaMini.apply(stage, tokens, replace(context, valid=valid, text_valid=words), unscaled).tokens, out.tokens, **CLOSE
    )


def test_slow_frequencies_are_stretched_by_hand() -> None:
    # context 2 pi, low 1, high 3: s = (f - 1) / 2 within 0 and 1. theta 4, head_dim 4: f = 1, 1/2, both s = 0: divided by the factor.
    config = LlavaMini.Config(rope_theta=4.0, rope_scaling=(8.0, 1.0, 3.0, 2 * torch.pi))
    torch.testing.assert_close(rope_frequencies(4, config), torch.tensor([1.0, 0.5]) / 8)
    # low 1/4, high 5/4: s = f - 1/4, so 3/4 and 1/4: 1 * (1/4 / 8 + 3/4) and 1/2 * (3/4 / 8 + 1/4)
    config = LlavaMini.Config(rope_theta=4.0, rope_scaling=(8.0, 0.25, 1.25, 2 * torch.pi))
    torch.testing.assert_close(rope_frequencies(4, config), torch.tensor([25 / 32, 11 / 64]))


def test_the_first_cut_hands_on_class_tokens_patches_and_queries() -> None:
    stage, tokens, context = context_for(LlavaMini, CONFIG, "encoder")
    out = LlavaMini.apply(stage, tokens, context, CONFIG)
    assert torch.equal(out.tokens[:, :65], tokens)
    assert out.source[0].tolist() == [*range(65), -1, -1, -1, -1]
    alone = CONFIG.model_copy(update={"prefusion": 0})
    assert len(LlavaMini.stages(Site.parse("encoder"), alone, FACTS)) == 1
    only = LlavaMini.apply(stage, tokens, context, alone)
    assert only.source[0].tolist() == [0, -1, -1, -1, -1]
    assert torch.equal(only.tokens[:, 1:], out.tokens[:, 65:])
