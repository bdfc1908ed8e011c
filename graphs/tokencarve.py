"""TokenCarve: keep informative and attended visual tokens, and merge half of the rest of a first selection into them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_site, selected
from tmc_export.graphs._contract import Attention, Budget, Compressed, Context, Layout, Method, MethodConfig, Sample, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TokenCarve"]

_SCORE = Attention(layer="previous", rows="last", heads="mean")


@register("tokencarve")
class TokenCarve(Method):
    """TokenCarve, information-preserving selection and merging inside the decoder.

    Paper: "TokenCarve: Information-Preserving Visual Token Compression in Multimodal Large Language Models", arXiv:2503.10501.

    At the input of layer L, with X the candidates, `X = U S V^T`, and A the attention of layer L-1 from the last token, averaged over
    heads: `score = weight * R(A) + (1 - weight) * R(sum_j |U S|_ij)`, where R is the rank score n … 1. The `floor(1.5 K)` best are split in
    order of score into a first half P and the others Q; each of Q has the partner in P of the largest cosine (no epsilon); the `floor(K /
    2)` of Q with the largest maximum are
    averaged into their partner, `(p + sum q) / (1 + count)`. P and the rest of Q stay: K tokens, in their order.

    Shapes (b batch, n candidates, K kept, c channels): tokens `[b, n, c]` -> `[b, K, c]`; scores `[b, n]`, the decomposition and the
    cosines in float32. Positions are kept. `kv`: the layers below L keep the KV of the K candidates only.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = TokenCarve.Config(keep=16)
    >>> stage, tokens, context = context_for(TokenCarve, config, "decoder.2", seed=0)
    >>> out = TokenCarve.apply(stage, tokens, context, config)
    >>> out.tokens.shape[1], sorted(out.kv)
    (16, [0, 1])

    Limits: n <= c, as the official code. The decomposition is `_spectrum.py`'s: some 300 n^3 multiply-adds (60 G at n=576, about 2 s on one
    desktop core) and 2,000 nodes; `scores: attention` leaves it out. Its row sums are good to 1e-6 … 4e-6 of the largest, so tokens whose
    sums are closer than that may swap ranks (12 of 576 random ones moved, by one place each). Zero or repeated singular values leave U
    undefined there.

    Where the official code differs: it recomputes positions for the mask and rotates by the original ones; here they are simply kept.
    Rank sums tie often: ties go to the lowest index. One picture per prompt there; every item of a batch by itself here.
    """

    paper = "TokenCarve, arXiv:2503.10501"
    official = "ShawnTan86/TokenCarve@a57bd59 TokenCarve/modeling_llama.py:LlamaModel.forward"
    mechanism = "attention"
    sites = ("decoder.<k>",)
    query_aware = True

    samples = (Sample("decoder.2", {"scores": "attention", "keep": 20}), Sample("decoder.2", {"keep": 21}))

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the visual tokens that stay.
            weight: share of the attention in the joint rank.
            scores: what the first selection ranks by: both, only the attention, or only the information (singular values).
        """

        keep: Budget = Budget(share=0.25)
        weight: float = Field(default=0.5, ge=0, le=1)
        scores: Literal["both", "attention", "information"] = "both"

    @staticmethod
    def stages(at: Site, config: TokenCarve.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("tokencarve", at, "decoder")
        depth = facts.decoder.layers
        if not 1 <= (at.layer or 0) < depth:
            raise ValueError(
                f"tokencarve at {at} needs a layer before and after the cut; use decoder.1 to decoder.{depth - 1} (the paper: decoder.2)"
            )
        return (Stage(at, (_SCORE,)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: TokenCarve.Config, facts: ModelFacts) -> Layout:
        """K tokens here and in the KV of every layer before."""
        k = kept_of(config.keep, layout.tokens, stage.at, "floor")
        if k < 2 or k + k // 2 > layout.tokens:
            raise ValueError(
                f"keep: {k} of the {layout.tokens} tokens at {stage.at}: tokencarve first picks 1.5 times as many and merges the rest "
                "into them; "
                f"keep 2 to {(2 * layout.tokens + 1) // 3} tokens"
            )
        if config.scores != "attention" and layout.tokens > layout.width:
            raise ValueError(
                f"tokencarve decomposes {layout.tokens} tokens of width {layout.width} at {stage.at} and needs at most as many tokens "
                "as channels; "
                "compress before it, or set scores: attention"
            )
        return replace(selected(layout, k), kv_rows={layer: k for layer in range(stage.at.layer or 0)})

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: TokenCarve.Config) -> Compressed:
        """Select by joint rank, then merge half of the second half."""
        import torch

        from tmc_export.graphs._ops import complement, gather, one_hot, top_in_order

        n = tokens.shape[1]
        k = TokenCarve.layout(stage, context.layout, config, context.facts).tokens
        valid = context.valid
        first = top_in_order(joint_rank(tokens, context, config), k + k // 2, valid)
        half = (k + k // 2) // 2
        anchors, others = first[:, :half], first[:, half:]
        partner, merged = _pairs(tokens, anchors, others, k // 2, valid)
        joining = gather(others, merged)
        weight = gather(valid, joining).float().unsqueeze(1)
        member = one_hot(gather(partner, merged), half).transpose(1, 2) * weight
        mean = (gather(tokens, anchors).float() + member @ gather(tokens, joining).float()) / (1.0 + member.sum(dim=2, keepdim=True))
        rest = gather(others, complement(merged, others.shape[1]))
        where = torch.cat([anchors, rest], dim=1)
        out = torch.cat([mean.to(tokens.dtype), gather(tokens, rest)], dim=1)
        order = _ascending(where)
        source = gather(where, order)
        row = _rows_of(source, anchors, joining, gather(partner, merged), n)
        kv = {layer: source for layer in range(stage.at.layer or 0)}
        return Compressed(gather(out, order), source, gather(valid, source), assign=row, kv=kv)


def joint_rank(tokens: Tensor, context: Context, config: TokenCarve.Config) -> Tensor:
    """Return the score `[b, n]` of the first selection; larger is better."""
    from tmc_export.graphs._ops import rank
    from tmc_export.graphs._spectrum import singular_row_sums

    n, valid = tokens.shape[1], context.valid
    attention = (n - rank(context.captured[_SCORE], valid)).float()
    if config.scores == "attention":
        return attention
    mass = singular_row_sums(tokens.float() * valid.float().unsqueeze(2))
    information = (n - rank(mass, valid)).float()
    if config.scores == "information":
        return information
    return config.weight * attention + (1.0 - config.weight) * information


def _pairs(tokens: Tensor, anchors: Tensor, others: Tensor, count: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return each other's anchor `[b, q]` and the `count` others `[b, count]` that merge, as places among the others."""
    import torch

    from tmc_export.graphs._ops import argmax, cosine, gather, top_in_order

    score = cosine(gather(tokens, others), gather(tokens, anchors))
    both = gather(valid, others).unsqueeze(2) & gather(valid, anchors).unsqueeze(1)
    score = torch.where(both, score, torch.full_like(score, -2.0))
    return argmax(score), top_in_order(score.amax(dim=2), count)


def _ascending(index: Tensor) -> Tensor:
    """Return the places `[b, k]` that put distinct indices `[b, k]` in ascending order."""
    from tmc_export.graphs._ops import order_by

    smaller = (index.unsqueeze(1) < index.unsqueeze(2)).float().sum(dim=2).long()
    return order_by(smaller)


def _rows_of(source: Tensor, anchors: Tensor, joining: Tensor, partner: Tensor, n: int) -> Tensor:
    """Return the output row `[b, n]` of every candidate: its own, its anchor's when it merged, else -1."""
    from tmc_export.graphs._ops import gather, one_hot

    row = one_hot(source, n).transpose(1, 2) @ _counting(source).float().unsqueeze(2)
    own = row.squeeze(2) - 1.0
    anchor_row = gather(own, gather(anchors, partner))
    moved = (one_hot(joining, n).transpose(1, 2) @ (anchor_row + 1.0).unsqueeze(2)).squeeze(2)
    return (own + moved).long()


def _counting(index: Tensor) -> Tensor:
    """Return 1 … k in the shape of `index` `[b, k]`."""
    import torch

    return torch.arange(1, index.shape[1] + 1).expand(index.shape[0], -1)
