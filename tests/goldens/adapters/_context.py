"""What adapters share: made-up facts of the golden's size, and contexts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Context, Layout, Need, Segment
from tmc_export.graphs._synthetic import small_facts


def square(n: int) -> tuple[int, int]:
    """The square raster of n tokens; raises when there is none."""
    side = round(n**0.5)
    if side * side != n:
        raise ValueError(f"{n} tokens are no square")
    return side, side


def facts(encoder_layers: int = 4, decoder_layers: int = 32, class_tokens: int = 0) -> ModelFacts:
    made = small_facts(class_tokens=class_tokens)
    return replace(made, encoder=replace(made.encoder, layers=encoder_layers), decoder=replace(made.decoder, layers=decoder_layers))


def layout(n: int, width: int, class_tokens: int = 0, grid: tuple[int, int] | None = None) -> Layout:
    visual = Segment("visual", n - class_tokens, grid)
    return Layout((Segment("class", class_tokens), visual) if class_tokens else (visual,), width)


def context(
    tokens: Tensor,
    arriving: Layout,
    model: ModelFacts,
    captured: Mapping[Need, Tensor] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Context:
    """A context in which every candidate is valid."""
    b, n = tokens.shape[0], tokens.shape[1]
    return Context(
        layout=arriving,
        facts=model,
        valid=torch.ones(b, n, dtype=torch.bool),
        source=torch.arange(n).expand(b, n),
        positions=None,
        captured=captured or {},
        state=state or {},
    )
