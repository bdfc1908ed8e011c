"""How each selector is timed alone (`_selector.py`): the site, options that keep about a quarter, the sizes, and the model's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["CASES", "CROPS", "LARGE", "PATCHES", "TEXT", "Case", "facts"]

PATCHES, CROPS, TEXT = 576, 5, 64
"""Patches of a picture; pictures of LLaVA-NeXT's five crops; text tokens of the prompt."""
LARGE = PATCHES * CROPS

_Options = Callable[[int], Mapping[str, Any]]


@dataclass(frozen=True)
class Case:
    """How a method is used here.

    Attributes:
        at: the site.
        options: of the recipe, for a number of candidates; about a quarter stays.
        scope: with several pictures, a budget for each or one for all.
        sizes: visual tokens of the prompt.
        above: why its selector may take more than the bound, and at which size; empty: it may not.
    """

    at: str
    options: _Options
    scope: Literal["image", "joint"] = "image"
    sizes: tuple[int, ...] = (PATCHES, LARGE)
    above: Mapping[int, str] = field(default_factory=dict)


def _quarter(n: int) -> Mapping[str, Any]:
    return {"keep": "25%"}


_SEQUENTIAL = "one pick after another, each against all candidates: as many dependent steps as tokens stay"
_SVD = "a singular value decomposition out of products of n x n matrices, some forty rounds of them"
_SINKHORN = "two n x n cost matrices and iterations of optimal transport over them"

CASES: Mapping[str, Case] = {
    "random": Case("decoder.0", _quarter, "joint"),
    # similarity
    "auroracap": Case("encoder", lambda n: {"keep": "22%"}),  # 19 a layer, as tome
    "chat_univi": Case("encoder", lambda n: {"clusters": (82, 41, 21)}),
    "dart": Case("decoder.0", _quarter, "joint"),
    "divprune": Case("decoder.0", _quarter, "joint", above={LARGE: _SEQUENTIAL}),
    "folder": Case("encoder", _quarter),
    "tome": Case("encoder", lambda n: {"r": 19}),
    "topv": Case("decoder.3", _quarter, above={PATCHES: _SINKHORN, LARGE: _SINKHORN}),
    # attention in the encoder
    "dynamicvit": Case("encoder", lambda n: {"keep": ("63%", "40%", "25%")}),
    "evit": Case("encoder", lambda n: {"keep": "63%"}),
    "globalcom2": Case("projector", _quarter, sizes=(LARGE,)),
    "madtp": Case("encoder", lambda n: {"keep": "63%"}),
    "prumerge": Case("encoder", lambda n: {"keep": 143}),
    "visionzip": Case("encoder", lambda n: {"dominant": 122, "contextual": 22}),
    "vispruner": Case("encoder", lambda n: {"keep": 144}),
    # attention in the decoder
    "atp_llava": Case("decoder.4", lambda n: {"layers": (4, 10, 16), "keep": ("63%", "63%", "63%")}),
    "fastv": Case("decoder.2", _quarter, "joint"),
    "fitprune": Case("decoder.2", lambda n: {"delete": (0, *[n // 16] * 12)}, "joint"),
    "mustdrop": Case("encoder.1", lambda n: {}),
    "pyramiddrop": Case("decoder.6", lambda n: {"layers": (6, 12, 18)}, "joint"),
    "st3": Case("decoder.2", _quarter, "joint"),
    "tokencarve": Case("decoder.2", _quarter, above={PATCHES: _SVD, LARGE: _SVD}),
    "vtw": Case("decoder.12", lambda n: {}, "joint"),
    "zipvl": Case("decoder.2", lambda n: {"keep": ("25%",)}, "joint"),
    # attention and query, without weights of their own in the decoder
    "adafv": Case("decoder.0", _quarter),
    "sparsevlm": Case("decoder.3", lambda n: {}, "joint"),
    "trim": Case("encoder", lambda n: {"keep": 143}),
}
"""Every registered method that selects or merges; `random` is what selection costs without a selector."""


def facts() -> Any:
    """LLaVA with CLIP-L/14-336 (its last layer unused) and the 0.36B decoder of these benchmarks."""
    from tmc_export.core.facts import DecoderFacts, EncoderFacts, ModelFacts

    encoder = EncoderFacts(layers=23, width=1024, heads=16, intermediate=4096, patch=14, class_tokens=1, merge=1, grid=(24, 24), spare=1)
    decoder = DecoderFacts(
        layers=24, width=896, heads=14, kv_heads=2, head_dim=64, intermediate=4864, vocabulary=32000, rope_axes=1, tied=False, context=4096
    )
    return ModelFacts("llava", "LlavaForConditionalGeneration", encoder, decoder, (24, 24), 31999)
