"""The perceiver and Qwen-VL's resampler, which no golden covers: against torch's attention modules; positions against its resizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tmc_export.graphs._contract import Context, Method, MethodConfig, Site
from tmc_export.graphs._resampler import cubic_matrix, resize_positions, sincos_positions
from tmc_export.graphs._synthetic import context_for, small_facts
from tmc_export.graphs.perceiver import Perceiver
from tmc_export.graphs.qwen_resampler import QwenResampler

# float32 sums in another order, of values of size 1
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def _made(method: type[Method], config: MethodConfig) -> tuple[Tensor, Context, Tensor]:
    """Tokens, context and what the method makes of them; weights of size 1 / 2, so that attention is not flat."""
    stage, tokens, context = context_for(method, config, "projector.replace", batch=2, seed=3)
    context = replace(context, weights={name: value * 5 for name, value in context.weights.items()})
    return tokens, context, method.apply(stage, tokens, context, config).tokens


def _norm(x: Tensor, weights: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    return functional.layer_norm(x, (x.shape[-1],), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def _perceiver(x: Tensor, w: Mapping[str, Tensor], heads: int, depth: int) -> Tensor:
    latents = w["latents"].expand(x.shape[0], -1, -1)
    for i in range(depth):
        media, own = (_norm(t, w, f"layers.{i}.0.norm_{name}", 1e-5) for t, name in ((x, "media"), (latents, "latents")))
        q, both = own @ w[f"layers.{i}.0.to_q.weight"].T, torch.cat([media, own], dim=1)
        k, v = (both @ half.T for half in w[f"layers.{i}.0.to_kv.weight"].chunk(2))
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        read = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        latents = latents + read @ w[f"layers.{i}.0.to_out.weight"].T
        inner = functional.gelu(_norm(latents, w, f"layers.{i}.1.0", 1e-5) @ w[f"layers.{i}.1.1.weight"].T)
        latents = latents + inner @ w[f"layers.{i}.1.3.weight"].T
    return _norm(latents, w, "norm", 1e-5)


def test_the_perceiver_equals_a_plain_one() -> None:
    config = Perceiver.Config(latents=6, depth=3, heads=2, dim_head=4)
    tokens, context, got = _made(Perceiver, config)
    want = _perceiver(tokens, context.weights, heads=2, depth=3) @ context.weights["proj.weight"].T + context.weights["proj.bias"]
    torch.testing.assert_close(got, want, **CLOSE)
    without_latents = _perceiver(tokens[:, :-1], context.weights, heads=2, depth=3)
    assert not torch.allclose(without_latents @ context.weights["proj.weight"].T + context.weights["proj.bias"], want, **CLOSE)


def test_the_perceiver_projects_only_where_widths_differ() -> None:
    assert "proj.weight" in Perceiver.weights(Perceiver.Config(), small_facts())
    assert "proj.weight" not in Perceiver.weights(Perceiver.Config(), small_facts(width=32))  # the encoder's width


@pytest.mark.parametrize("grid", [4, (3, 5), 8])
def test_qwens_resampler_equals_torchs_attention(grid: int | tuple[int, int]) -> None:
    config = QwenResampler.Config(grid=grid, heads=4)
    tokens, context, got = _made(QwenResampler, config)
    w, (rows, columns), d = context.weights, (grid, grid) if isinstance(grid, int) else grid, context.facts.decoder.width
    attention = nn.MultiheadAttention(d, 4, batch_first=True)
    attention.load_state_dict({name.removeprefix("attn_pool.attn."): v for name, v in w.items() if name.startswith("attn_pool.attn.")})
    x = _norm(tokens[:, context.layout.class_tokens :] @ w["attn_pool.kv_proj.weight"].T, w, "attn_pool.ln_kv", 1e-6)
    image = w["attn_pool.pos_embed"].T.reshape(1, d, rows, columns)
    image = functional.interpolate(image, size=(8, 8), mode="bicubic", align_corners=False)
    query = _norm(w["attn_pool.query"], w, "attn_pool.ln_q", 1e-6) + w["attn_pool.pos_embed"]
    with torch.no_grad():
        y, _ = attention(query.expand(2, -1, -1), x + image.flatten(2).transpose(1, 2), x)
        bare, _ = attention(query.expand(2, -1, -1), x, x)
    torch.testing.assert_close(got, _norm(y, w, "ln_post", 1e-6) @ w["proj"], **CLOSE)
    assert not torch.allclose(got, _norm(bare, w, "ln_post", 1e-6) @ w["proj"], **CLOSE)  # the keys' positions matter


@pytest.mark.parametrize(
    ("arriving", "leaving"), [((16, 16), (32, 32)), ((3, 5), (8, 7)), ((1, 1), (4, 4)), ((6, 6), (6, 6)), ((9, 4), (5, 3))]
)
def test_positions_are_resized_as_torch_does(arriving: tuple[int, int], leaving: tuple[int, int]) -> None:
    positions = torch.randn(arriving[0] * arriving[1], 8, generator=torch.Generator().manual_seed(0))
    image = positions.T.reshape(1, 8, *arriving)
    want = functional.interpolate(image, size=leaving, mode="bicubic", align_corners=False).flatten(2)[0].T
    torch.testing.assert_close(resize_positions(positions, arriving, leaving), want, **CLOSE)


def test_cubic_rows_by_hand() -> None:
    # 4 -> 2: z = 0.5 and 2.5, neighbours at distances 1.5, 0.5, 0.5, 1.5. With a = -3/4: near(1/2) = 1 - 9/4 * 1/4 + 5/4 * 1/8 = 19/32,
    # far(3/2) = -3/4 * (27/8 - 45/4 + 12 - 4) = -3/32. At z = 0.5 the neighbours are -1 (moved to 0), 0, 1, 2.
    want = torch.tensor([[16.0, 19.0, -3.0, 0.0], [0.0, -3.0, 19.0, 16.0]]) / 32
    torch.testing.assert_close(cubic_matrix(4, 2), want)


def test_sincos_positions_by_hand() -> None:
    # width 8: two frequencies, 1 and 10000^(-1/2) = 0.01; the column's sines and cosines first, then the row's. Row 1, column 2 of 2 x 3:
    found = sincos_positions(8, (2, 3))
    angles = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])
    want = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())])
    torch.testing.assert_close(found[1 * 3 + 2], want)
    assert found.shape == (6, 8)
    with pytest.raises(ValueError, match="divides by 4, got 6; choose"):
        sincos_positions(6, (2, 3))


def test_refusals_name_the_value_and_the_remedy() -> None:
    replace_site = Site.parse("projector.replace")
    with pytest.raises(ValueError, match="96 does not divide into heads: 5; set heads"):
        QwenResampler.stages(replace_site, QwenResampler.Config(heads=5), small_facts())
    with pytest.raises(ValueError, match="decoder width that divides by 4.* 98; use perceiver"):
        QwenResampler.stages(replace_site, QwenResampler.Config(heads=1), small_facts(width=98))
    with pytest.raises(ValueError):
        QwenResampler.Config(grid=(0, 4))
