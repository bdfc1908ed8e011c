"""LLaVA-PruMerge: the patches the class token attends to most, each with its nearest neighbours added, and one token for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_class_token, need_raster_encoder, need_site
from tmc_export.graphs._contract import (
    Attention,
    Budget,
    Compressed,
    Context,
    Keys,
    Layout,
    Method,
    MethodConfig,
    Sample,
    Segment,
    Site,
    Stage,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PruMerge"]


@dataclass(frozen=True)
class _Counts:
    """Static numbers of a cut: patches that arrive, best-attended ones that stay, places sampled evenly, and how many of those stay."""

    patches: int
    attended: int
    places: tuple[int, ...]
    sampled: int

    @property
    def rows(self) -> int:
        return self.attended + self.sampled


@register("prumerge")
class PruMerge(Method):
    """PruMerge and PruMerge+ (`plus`), selection by class attention with unnormalised merging.

    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025, arXiv:2403.15388.

    With q and k the query and keys of the layer *after* the one whose features x are used, over the whole width C (one head):
    `a = softmax(q_class k^T / sqrt(C))` over all tokens, class token included. The `floor(N * keep)` patches of the largest a stay, in
    falling order (K of them, with the sampled ones of `plus`). For each, of all other patches, the `neighbours` of the largest cosine of
    the keys (epsilon 1e-12) are added: `y_i = x_i + sum_j a_j x_j`; one last token is `sum over dropped j of a_j x_j`. `plus: distinct`
    adds the patches of `range(0, N-1, step)`, `step = int(int(1/keep) / 3)`, that are not among the best (the released inference);
    `plus: repeated` adds `range(step // 2, N-1, step)`, `step = int(1/keep)`, whether or not they are (its training form).

    Shapes (b batch, n candidates of which the first is the class token, N = n-1, c channels): tokens `[b, n, c]` -> `[b, K+1, c]`; a
    `[b, n]` and the cosines `[b, K, N]` in float32. `mix` holds the weights; `assign` names a candidate's own row, else the last.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = PruMerge.Config(keep=8, neighbours=4, scores="previous")
    >>> stage, tokens, context = context_for(PruMerge, config, "encoder", seed=0)
    >>> PruMerge.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (9, 65)

    Limits: needs one class token; the tokens are not in the order of the picture. `plus: repeated` merges by fixed places, so a padded
    place leaves an invalid token. `step` counts patches along the raster's rows, as the official code does.

    Where the official code differs: it takes the share of outliers of a (above Q3 + 1.5 IQR, over the whole batch) for `keep`; here that
    is a budget, and with its count the same tokens come out. Under `plus: distinct` the number of places that are not among the best is
    left to the data; here `sampled` of them stay, those of the largest a, filled up with the best remaining patches. The paper's weighted
    mean is an unnormalised sum in the code, and here. `plus: repeated`: a place that is among the best gives two tokens, and as many
    dropped patches (the first ones; padding before them) count nowhere. 575 is N-1 here. Ties go to the lowest index.
    """

    paper = "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, ICCV 2025, arXiv:2403.15388"
    official = (
        "42Shawn/LLaVA-PruMerge@097c041 llava/model/multimodal_encoder/clip_encoder.py:"
        "CLIPVisionTower.token_prune_merge_advanced, token_prune_merge_advanced_plus"
    )
    mechanism = "attention"
    sites = ("encoder",)
    budgets = "share of outliers; evenly spaced patches not yet kept"

    samples = (
        Sample("encoder", {"keep": 9, "neighbours": 7}),
        Sample("encoder", {"keep": 11, "plus": "distinct", "step": 4}),
        Sample("encoder", {"keep": 8, "plus": "repeated", "scores": "previous"}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the patches kept for their attention; the token for the rest and `plus` come on top.
            plus: evenly spaced patches besides: none, those not yet kept (`distinct`), or all of them (`repeated`).
            step: spacing of those patches; from `keep` when left out.
            sampled: how many of them stay under `distinct`; when left out, the number that is expected not to be among the best.
            neighbours: patches added to each kept one.
            scores: the layer whose query and keys are used: `next`, behind the features (the official one), or `previous`, for a model
                that uses its encoder's last layer.
        """

        keep: Budget = Budget(share=0.125)
        plus: Literal["off", "distinct", "repeated"] = "off"
        step: int | None = Field(default=None, ge=1)
        sampled: int | None = Field(default=None, ge=1)
        neighbours: int = Field(default=32, ge=1)
        scores: Literal["next", "previous"] = "next"

    @staticmethod
    def stages(at: Site, config: PruMerge.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut, after the last encoder layer in use."""
        need_site("prumerge", at, "encoder")
        if at.layer is not None:
            raise ValueError(f"prumerge acts after the whole encoder, not at {at}; write at: encoder")
        need_class_token("prumerge", facts)
        need_raster_encoder("prumerge", at, facts)
        if config.scores == "next" and facts.encoder.spare < 1:
            raise ValueError(
                f"prumerge scores with the layer after the features, and {facts.architecture} uses all {facts.encoder.layers} layers of "
                "its encoder; set scores: previous"
            )
        return (Stage(at, _needs(config)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: PruMerge.Config, facts: ModelFacts) -> Layout:
        """The merged patches, and the token for the rest."""
        counts = _counts(stage, layout, config)
        return Layout((Segment("visual", counts.rows), Segment("visual", 1)), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: PruMerge.Config) -> Compressed:
        """Choose the patches, then add neighbours and the rest by one matrix."""
        import torch
        from torch.nn import functional

        from tmc_export.graphs._ops import gather

        counts = _counts(stage, context.layout, config)
        attention, keys = (context.captured[need] for need in _needs(config))
        valid = context.valid[:, 1:]
        score = torch.where(valid, attention[:, 1:].float(), 0.0)
        index, others = _choose(score, valid, counts, config)
        weights = _weights(keys[:, 1:].flatten(2), score, valid, index, others, config.neighbours)
        mix = functional.pad(weights, (1, 0))
        out = (mix @ tokens.float()).to(tokens.dtype)
        any_left = (gather(valid, others).float().sum(dim=1, keepdim=True)) > 0
        source = torch.cat([index + 1, torch.full_like(index[:, :1], -1)], dim=1)
        kept_valid = torch.cat([gather(valid, index), any_left], dim=1)
        return Compressed(out, source, kept_valid, assign=_assign(index, others, valid, counts.rows), mix=mix)


def _needs(config: PruMerge.Config) -> tuple[Attention, Keys]:
    return Attention(layer=config.scores, rows="cls", heads="joined"), Keys(layer=config.scores)


def _counts(stage: Stage, layout: Layout, config: PruMerge.Config) -> _Counts:
    """Return the numbers of the cut; raises `ValueError` when they do not fit."""
    if layout.class_tokens != 1:
        raise ValueError(f"prumerge needs the class token at {stage.at}, and {layout.class_tokens} arrive; put prumerge first")
    n = layout.tokens - 1
    k = kept_of(config.keep, n, stage.at, "floor")
    every = int(1 / (config.keep.share or k / n))
    step = config.step or (every if config.plus == "repeated" else every // 3)
    if config.plus != "off" and step < 1:
        raise ValueError(
            f"keep: {config.keep} of the {n} patches at {stage.at} leaves a spacing of 0 for the patches of plus: {config.plus}; "
            f"lower keep to at most {n // 3}, or set step"
        )
    places: tuple[int, ...] = ()
    if config.plus != "off":
        places = tuple(range(0 if config.plus == "distinct" else step // 2, n - 1, step))
    sampled = len(places)
    if config.plus == "distinct":
        sampled = config.sampled or max(1, sampled - sampled * k // n)
    if k + sampled >= n:
        raise ValueError(
            f"keep: {k} patches for their attention and {sampled} evenly spaced ones leave none of the {n} at {stage.at} to merge; "
            "lower keep, or raise step"
        )
    if config.neighbours >= n:
        raise ValueError(f"neighbours: {config.neighbours} is more than the {n - 1} other patches at {stage.at}; lower neighbours")
    return _Counts(n, k, places, sampled)


def _choose(score: Tensor, valid: Tensor, counts: _Counts, config: PruMerge.Config) -> tuple[Tensor, Tensor]:
    """Return the kept patches `[b, K]`, best-attended ones first, and those that go into the last token, ascending."""
    import torch

    from tmc_export.graphs._ops import complement, keep_top, one_hot, order_by, rank

    n, k = counts.patches, counts.attended
    place = rank(score, valid)
    top = order_by(place)[:, :k]
    if config.plus == "off":
        return top, complement(top, n)
    b = score.shape[0]
    if config.plus == "distinct":
        sampled = torch.tensor([1.0 if i in set(counts.places) else 0.0 for i in range(n)])
        preferred = (n - place).float() + n * sampled
        preferred = torch.where(place < k, -1.0, torch.where(valid, preferred, 0.0))
        index = torch.cat([top, keep_top(preferred, counts.sampled)[0]], dim=1)
        return index, complement(index, n)
    index = torch.cat([top, torch.tensor(counts.places).expand(b, -1)], dim=1)
    later = torch.arange(1, n + 1).float() + n * valid.float()
    dropped = torch.where(one_hot(index, n).amax(dim=1) > 0, 0.0, later)
    return index, keep_top(dropped, n - counts.rows)[0]


def _weights(keys: Tensor, score: Tensor, valid: Tensor, index: Tensor, others: Tensor, neighbours: int) -> Tensor:
    """Return the map `[b, K+1, N]` from patches to tokens: each kept patch with its neighbours, and the sum of the others.

    Neighbours are looked for in the official order, kept patches before dropped ones, so that ties fall as there.
    """
    import torch

    from tmc_export.graphs._ops import chosen, gather, normalize, one_hot

    b, n, kept = score.shape[0], score.shape[1], index.shape[1]
    everyone = torch.cat([index, others], dim=1)
    unit = normalize(keys, 1e-12)
    near = gather(unit, index) @ gather(unit, everyone).transpose(1, 2)
    near = torch.where(gather(valid, everyone).unsqueeze(1), near, -2.0)
    near = torch.where(torch.eye(kept, everyone.shape[1]) > 0, -3.0, near)
    among = chosen(near.flatten(0, 1), neighbours).reshape(b, kept, -1).float()
    added = (among * gather(score, everyone).unsqueeze(1)) @ one_hot(everyone, n)
    rest = gather(score, others).unsqueeze(1) @ one_hot(others, n)
    return torch.cat([one_hot(index, n) + added, rest], dim=1)


def _assign(index: Tensor, others: Tensor, valid: Tensor, last: int) -> Tensor:
    """Return the row `[b, n]` of every candidate: its own (the first, when it has two), else the last; -1 for what counts nowhere."""
    import torch
    from torch.nn import functional

    from tmc_export.graphs._ops import argmax, one_hot

    n = valid.shape[1]
    rows = one_hot(index, n).transpose(1, 2)
    merged = (one_hot(others, n).amax(dim=1) > 0) & valid
    outside = torch.where(merged, last, -1)
    return functional.pad(torch.where(rows.amax(dim=2) > 0, argmax(rows), outside), (1, 0), value=-1)
