"""SparseVLM: visual tokens that the relevant text tokens attend to, and clusters of some of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_site
from tmc_export.graphs._contract import (
    Attention,
    Budget,
    Compressed,
    Context,
    Layout,
    Method,
    MethodConfig,
    Sample,
    Segment,
    Site,
    Stage,
    TextEmbeds,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TABLES", "SparseVLM", "merge_clusters", "ratings", "score"]

_TEXT = TextEmbeds()
_MEAN = Attention(layer="previous", rows="text", heads="mean")
_HEADS = Attention(layer="previous", rows="text", heads="none")

TABLES: dict[int, dict[int, tuple[int, int, int]]] = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Version -> average visual tokens over all layers -> tokens kept at each of three cuts, of 576."""

_SHARES = (Budget(share=0.52), Budget(share=0.65), Budget(share=0.54))  # those of 192, of what arrives


@register("sparsevlm")
class SparseVLM(Method):
    """SparseVLM, text-guided selection in several stages, with recycling of dropped tokens.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv:2410.04417.

    Raters, on the embeddings that enter the decoder: text token t rates when `mean over v of softmax_t(v . t)` is above its mean over t.
    After each of `layers`, with A the attention of the layer before: `score_i = mean over raters of mean over heads of A[t, i]`; the `keep`
    best stay, in their order. Version 1 recycles: of the d dropped ones the best `int(recycle d) + 1 = m` are clustered (DPC-KNN,
    distance |x - y| / sqrt(c), `int(m / cluster) + 1` clusters, as many neighbours), and each cluster's
    `sum / (members + 1e-6)` is a token behind those kept. Version 2 recycles nothing, and averages only the `heads` heads whose attention
    from raters to candidates is largest in sum.

    Shapes (b batch, n candidates, m text tokens, c channels): tokens `[b, n, c]` -> `[b, k + clusters, c]` per stage; state `raters`
    `[b, m]` bool from `decoder.0` on; score `[b, n]` and clusters in float32. Positions: the first of the sequence, `truncate` (version 1),
    or kept (version 2).

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = SparseVLM.Config(layers=(3, 7), keep=("50%", "50%"))
    >>> [(str(stage.at), tokens.shape[1]) for stage, tokens, _ in contexts(SparseVLM, config, "decoder.3")]
    [('decoder.0', 64), ('decoder.3', 64), ('decoder.7', 34)]

    Limits: the paper's adaptive ratio (from the rank of A) is not in the released code, which has fixed tables, `retain`; neither is it
    here. Recycled tokens have no place in the picture. Attention from every text token is one more product per cut.

    Where the official code differs: its version 2 divides A by the product of rotated vectors of ones, which depends on the distance
    between text and picture alone; positions of text are not known here, so this is left out. It reads text behind the picture
    only; here all text tokens of the turn are rated (those before the picture see none of it and change no order). It adds noise below 1e-6
    to the densities; here ties go to the lowest index. It lowers a budget to n - 1 without a word. Its layers are counted from 0 and run
    before the cut: 2, 6, 15 there is 3, 7, 16 here. With no rater above the mean, all text tokens rate; there it is NaN.
    """

    paper = "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, ICML 2025, arXiv:2410.04417"
    official = "Gumpest/SparseVLMs@26a5f48 llava/model/language_model/{score.py,utils.py,modelling_sparse_llama.py}"
    mechanism = "query"
    budgets = "tokens kept at each cut: the paper ranks the attention, the released code has tables"
    sites = ("decoder.<k>",)
    query_aware = True

    samples = (
        Sample("decoder.3", {"layers": (3, 7), "keep": ("50%", "50%")}, too_much={"keep": (Budget(tokens=65), Budget(tokens=65))}),
        Sample("decoder.3", {"layers": (3,), "keep": (21,), "version": 2, "heads": 3}, too_much={"keep": (Budget(tokens=65),)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            version: 1 recycles dropped tokens and renumbers positions; 2 selects heads and does neither.
            layers: the cuts, as decoder layers that have run; the first is the one of `at`.
            keep: share of what arrives or number of tokens kept at each cut, clusters not counted.
            retain: the published table for 576 tokens whose average over all layers this is; instead of `keep`.
            recycle: share of the dropped tokens that is clustered; version 1.
            cluster: recycled tokens per cluster; version 1.
            heads: heads that are averaged; version 2.
        """

        version: Literal[1, 2] = 1
        layers: tuple[int, ...] = (3, 7, 16)
        keep: tuple[Budget, ...] | None = None
        retain: Literal[192, 128, 96, 64] | None = None
        recycle: float = Field(default=0.3, ge=0, lt=1)
        cluster: int = Field(default=10, ge=1)
        heads: int = Field(default=14, ge=1)

        @model_validator(mode="after")
        def _one_budget(self) -> SparseVLM.Config:
            if self.keep is not None and self.retain is not None:
                raise ValueError(f"keep and retain: {self.retain} both set the budgets; give one of them")
            return self

        @property
        def budgets(self) -> tuple[Budget, ...]:
            """The budget of each cut."""
            if self.retain is not None:
                return tuple(Budget(tokens=k) for k in TABLES[self.version][self.retain])
            return _SHARES if self.keep is None else self.keep

    @staticmethod
    def stages(at: Site, config: SparseVLM.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """A look at the embeddings, which cuts nothing, then one cut for each layer."""
        need_site("sparsevlm", at, "decoder")
        layers, depth = config.layers, facts.decoder.layers
        if not layers or len(layers) != len(config.budgets):
            raise ValueError(
                f"layers: {list(layers)} and {len(config.budgets)} budgets differ in number; give one keep for each layer, at least one"
            )
        if list(layers) != sorted(set(layers)) or layers[0] < 1 or layers[-1] >= depth:
            raise ValueError(
                f"layers: {list(layers)} must rise, from 1 to at most {depth - 1}: {facts.architecture} has {depth} decoder layers; "
                "set layers"
            )
        if at.layer != layers[0]:
            raise ValueError(f"layers: {list(layers)} start at {layers[0]}, and at: is {at}; write at: decoder.{layers[0]}")
        if config.version == 2 and config.heads > facts.decoder.heads:
            raise ValueError(f"heads: {config.heads} is more than the {facts.decoder.heads} of {facts.architecture}; lower heads")
        need = _MEAN if config.version == 1 else _HEADS
        cuts = (Stage(Site("decoder", layer), (need,), index + 1) for index, layer in enumerate(layers))
        return (Stage(Site("decoder", 0), (_TEXT,), 0), *cuts)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: SparseVLM.Config, facts: ModelFacts) -> Layout:
        """What arrives at `decoder.0`; later the kept tokens, and behind them the clusters."""
        if stage.index == 0:
            kept_of(config.budgets[0], layout.tokens, stage.at)  # refused here already, before anything is computed
            return layout
        k = kept_of(config.budgets[stage.index - 1], layout.tokens, stage.at)
        clusters = _recycled(layout.tokens - k, config)[1]
        segments = (Segment("visual", k), Segment("visual", clusters)) if clusters else (Segment("visual", k),)
        return Layout(segments, layout.width, "truncate" if config.version == 1 else "keep", synthetic=clusters)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: SparseVLM.Config) -> Compressed:
        """Rate the text tokens at `decoder.0`; later select, and recycle."""
        from tmc_export.graphs._ops import gather, keep_top

        if stage.index == 0:
            return _rate(tokens, context)
        rows = context.captured[_MEAN if config.version == 1 else _HEADS]
        points = score(rows, context.state["raters"], context.valid, config.heads)
        k = kept_of(config.budgets[stage.index - 1], tokens.shape[1], stage.at)
        kept, dropped = keep_top(points, k, context.valid)
        if dropped.shape[1] == 0 or config.version == 2:
            return Compressed(gather(tokens, kept), kept, gather(context.valid, kept), state=context.state)
        return _with_clusters(tokens, points, kept, dropped, context, config)


def _recycled(dropped: int, config: SparseVLM.Config) -> tuple[int, int]:
    """Return how many of the dropped tokens are clustered, and into how many clusters."""
    if config.version == 2 or dropped == 0:
        return 0, 0
    members = int(dropped * config.recycle) + 1
    return members, min(members, int(members / config.cluster) + 1)


def _rate(tokens: Tensor, context: Context) -> Compressed:
    """Keep everything, and find the text tokens that rate above the mean; all of them where none does."""
    import torch

    text, there = context.text, context.text_valid
    if text is None or there is None:
        raise ValueError("sparsevlm rates the prompt's embeddings at decoder.0, and none were handed over; ask for TextEmbeds")
    rates = ratings(tokens, context.valid, text, there)
    above = there & (rates > rates.sum(dim=1, keepdim=True) / there.float().sum(dim=1, keepdim=True).clamp_min(1.0))
    raters = there & (above | ~above.any(dim=1, keepdim=True))
    index = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1).contiguous()
    return Compressed(tokens, index, context.valid, state={"raters": raters})


def ratings(tokens: Tensor, valid: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
    """Return `[b, m]`: the mean over candidates `[b, n, c]` of their softmax over the text tokens `[b, m, c]`; padding counts nothing."""
    import torch

    product = tokens.float() @ text.float().transpose(1, 2)
    share = torch.where(text_valid.unsqueeze(1), product, torch.full_like(product, -1e30)).softmax(dim=2)
    share = torch.where(valid.unsqueeze(2) & text_valid.unsqueeze(1), share, torch.zeros_like(share))
    return share.sum(dim=1) / valid.float().sum(dim=1, keepdim=True).clamp_min(1.0)


def score(rows: Tensor, raters: Tensor, valid: Tensor, heads: int) -> Tensor:
    """Return the mean attention `[b, n]` from raters.

    Args:
        rows: attention `[b, m, n]` averaged over heads, or `[b, h, m, n]`, of which the heads with the largest sum are averaged.
        raters: `[b, m]` bool, the text tokens that count.
        valid: `[b, n]` bool, the candidates that count in a head's sum.
        heads: how many heads.
    """
    import torch

    from tmc_export.graphs._ops import gather, keep_top

    every = rows.float() if rows.dim() == 4 else rows.float().unsqueeze(1)
    asked = torch.where(raters[:, None, :, None], every, torch.zeros_like(every))
    total = asked.sum(dim=2) / raters.float().sum(dim=1).clamp_min(1.0)[:, None, None]
    if heads < total.shape[1]:
        mass = torch.where(valid.unsqueeze(1), total, torch.zeros_like(total)).sum(dim=2)
        total = gather(total, keep_top(mass, heads)[0])
    return total.mean(dim=1)


def merge_clusters(tokens: Tensor, count: int, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster tokens `[b, m, c]`: the `count` means `[b, count, c]`, the cluster of each token `[b, m]`, and the map `[b, count, m]`."""
    from tmc_export.graphs._dpc import cluster_means, dpc_knn, euclidean_distances

    assign = dpc_knn(euclidean_distances(tokens), count, count, valid).assign
    merged, mix = cluster_means(tokens, assign, count, eps=1e-6)
    return merged, assign, mix


def _with_clusters(tokens: Tensor, points: Tensor, kept: Tensor, dropped: Tensor, context: Context, config: SparseVLM.Config) -> Compressed:
    """The kept tokens `[b, k]`, and behind them the clusters of the best of the dropped ones `[b, d]`."""
    import torch

    from tmc_export.graphs._ops import gather, one_hot, top_in_order

    valid, (b, n), k = context.valid, tokens.shape[:2], kept.shape[1]
    members, count = _recycled(dropped.shape[1], config)
    best = gather(dropped, top_in_order(gather(points, dropped), members, gather(valid, dropped)))
    merged, cluster, mix = merge_clusters(gather(tokens, best), count, gather(valid, best))
    own = torch.arange(k).expand(b, -1)
    row = torch.cat([own, torch.where(cluster < 0, cluster, cluster + k)], dim=1)
    assign = torch.full((b, n), -1, dtype=torch.int64).scatter(1, torch.cat([kept, best], dim=1), row)
    return Compressed(
        torch.cat([gather(tokens, kept), merged.to(tokens.dtype)], dim=1),
        torch.cat([kept, torch.full((b, count), -1, dtype=torch.int64)], dim=1),
        torch.cat([gather(valid, kept), mix.sum(dim=2) > 0], dim=1),
        assign=assign,
        mix=torch.cat([one_hot(kept, n), mix @ one_hot(best, n)], dim=1),
        state=context.state,
    )
