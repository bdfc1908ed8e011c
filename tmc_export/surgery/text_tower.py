"""The text tower subgraph: a question's tokens in, its projected embedding out.

Input `ids [1, L]`, as the tower's own tokenizer makes and pads them; output `embedding [1, width]`. The embedding is read at the first end
token. Attention is causal, so that what follows that token, the padding, has no say and needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tmc_export.plan.types import TowerPlan

__all__ = ["TextTowerGraph"]


class TextTowerGraph(nn.Module):
    """A CLIP text encoder with its projection.

    Args:
        model: transformers' `CLIPTextModelWithProjection`.
        plan: its numbers.
    """

    def __init__(self, model: nn.Module, plan: TowerPlan) -> None:
        super().__init__()
        whole: Any = model
        self.text: Any = whole.text_model
        self.projection: Any = whole.text_projection
        self.plan = plan

    def input_names(self) -> list[str]:
        """Names of the inputs, in the order of `forward`."""
        return ["ids"]

    def output_names(self) -> list[str]:
        """Name of the output."""
        return ["embedding"]

    def forward(self, ids: Tensor) -> Tensor:
        """Encode one question; see the module's description."""
        count = self.plan.tokens
        hidden = self.text.embeddings(input_ids=ids)
        place = torch.arange(count)
        hidden_key = -3.0e4 if hidden.dtype == torch.float16 else torch.finfo(hidden.dtype).min
        mask = torch.where(place[None] > place[:, None], hidden_key, 0.0).to(hidden.dtype)[None, None]
        for layer in self.text.encoder.layers:
            hidden = layer(hidden, mask)
        hidden = self.text.final_layer_norm(hidden)
        ends = (ids == self.plan.end).float()
        before = ends @ (place[:, None] < place[None]).float()  # end tokens in front of each place
        first = torch.where(before == 0, ends, 0.0).to(hidden.dtype)
        embedding: Tensor = self.projection((first[:, None] @ hidden)[:, 0])
        return embedding
