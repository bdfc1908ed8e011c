"""The Q-Former as a whole against Hugging Face's BLIP-2: the checkpoint's names and shapes, and the tokens behind the projection."""

from __future__ import annotations

from dataclasses import replace

import torch

from tmc_export.graphs._synthetic import FACTS, context_for
from tmc_export.graphs.q_former import QFormer

CONFIG = QFormer.Config(queries=8, width=24, layers=4, heads=4, intermediate=64)


@torch.no_grad()
def test_blip2s_checkpoint_binds_by_name_and_its_tokens_come_out() -> None:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    encoder, decoder = FACTS.encoder, FACTS.decoder
    vision = {"hidden_size": encoder.width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    q_former = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    text = OPTConfig(hidden_size=decoder.width, num_hidden_layers=1, num_attention_heads=4, ffn_dim=16, vocab_size=50)
    text.word_embed_proj_dim = decoder.width
    q_former["encoder_hidden_size"] = encoder.width
    made = Blip2Config(vision_config=vision, qformer_config=q_former, text_config=text, num_query_tokens=8)
    model = Blip2ForConditionalGeneration(made).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    ours = ("query_tokens", "qformer.", "language_projection.")
    state = {name: value for name, value in model.state_dict().items() if name.startswith(ours)}
    assert {name: tuple(value.shape) for name, value in state.items()} == dict(QFormer.weights(CONFIG, FACTS))
    stage, tokens, context = context_for(QFormer, CONFIG, "projector.replace", batch=2)
    queries = model.query_tokens.expand(2, -1, -1)
    hidden = model.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    got = QFormer.apply(stage, tokens, replace(context, weights=state), CONFIG).tokens
    # four layers and a projection of float32 sums in another order, of values of size 1 to 10
    torch.testing.assert_close(got, model.language_projection(hidden), atol=5e-5, rtol=5e-5)
    once = QFormer.apply(stage, tokens, replace(context, weights=state), CONFIG.model_copy(update={"cross_attention_frequency": 4})).tokens
    assert not torch.allclose(got, once, atol=1e-2)
