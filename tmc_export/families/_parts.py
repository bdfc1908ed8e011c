"""Parts that several families share: a pre-norm ViT of the CLIP kind, and a Hugging Face decoder run layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tmc_export.families._contract import AttentionCore

__all__ = ["ClipLikeEncoder", "HuggingFaceDecoder"]


class ClipLikeEncoder:
    """The layers of a CLIP or SigLIP vision tower; both name their parts alike.

    Args:
        tower: `CLIPVisionModel` or `SiglipVisionModel`.
        layers: layers in use.
    """

    def __init__(self, tower: nn.Module, layers: int) -> None:
        self.tower: Any = tower
        self.layers = layers

    def attend(self, layer: int, tokens: Tensor, core: AttentionCore) -> Tensor:
        """Normalise, attend through `core`, project, add: `[b, n, c]` → `[b, n, c]`."""
        block = self.tower.encoder.layers[layer]
        attention = block.self_attn
        batch, count, width = tokens.shape
        normed = block.layer_norm1(tokens)
        query, key, value = (
            p(normed).view(batch, count, attention.num_heads, attention.head_dim).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = core(query, key, value, attention.scale).transpose(1, 2).reshape(batch, count, width)
        result: Tensor = tokens + attention.out_proj(mixed)
        return result

    def feed_forward(self, layer: int, tokens: Tensor) -> Tensor:
        """Normalise, MLP, add: `[b, n, c]` → `[b, n, c]`."""
        block = self.tower.encoder.layers[layer]
        result: Tensor = tokens + block.mlp(block.layer_norm2(tokens))
        return result


class HuggingFaceDecoder:
    """A decoder whose layers take `position_embeddings`, as Llama, Mistral, Qwen2, Qwen3 and Qwen2-VL do.

    Args:
        text: the model with `layers`, `norm`, `rotary_emb` and `embed_tokens`.
        head: the output head.
        axes: rotary axes of `positions`.
    """

    def __init__(self, text: nn.Module, head: nn.Module, axes: int) -> None:
        self._text: Any = text
        self._axes = axes
        whole: Any = text
        self.layers: nn.ModuleList = whole.layers
        self.norm: nn.Module = whole.norm
        self.embed: nn.Module = whole.embed_tokens
        self.head = head

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `positions [r, b, T]`."""
        cosine, sine = self._text.rotary_emb(hidden, positions if self._axes > 1 else positions[0])
        return cosine, sine

    def run(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """One layer, with the model's own code: `[b, T, c]` → `[b, T, c]`."""
        out = self.layers[layer](hidden, attention_mask=None, position_ids=None, past_key_values=None, position_embeddings=rotary)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def attention_only(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Input norm and self-attention; what matters is what the attention function records."""
        block: Any = self.layers[layer]
        block.self_attn(
            hidden_states=block.input_layernorm(hidden),
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            position_embeddings=rotary,
        )
