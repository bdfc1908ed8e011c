"""Chat-UniVi: the picture as clusters at three scales, each clustered from the one before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_raster_encoder, need_site
from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Sample, Segment, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ChatUniVi"]

_EPS = 1.0e-6


@register("chat_univi")
class ChatUniVi(Method):
    """Chat-UniVi, clustering by DPC-KNN at several scales.

    Paper: "Chat-UniVi: Unified Visual Representation Empowers Large Language Models with Image and Video Understanding", CVPR 2024,
    arXiv:2311.08046.

    One scale clusters tokens x into m, with `d_ij = |x_i - x_j| / sqrt(c)` and K neighbours, the token itself one of them:
    `rho_i = exp(-mean of the K smallest d_ij^2)`; `delta_i = min d_ij over rho_j > rho_i`, the largest d of all for the densest; the m best
    `rho * delta` are centres, in order of score; each token joins the nearest centre; out comes `sum of members / (count + 1e-6)`. The
    first scale clusters the patches, every further one the tokens of the one before; all scales leave, one run after the other.

    Shapes (b batch, n candidates, k tokens of all scales, c channels): tokens `[b, n, c]` -> `[b, k, c]`; all in float32. `source` names
    the centre of each token of the first scale, and -1 for the others. `assign` is the first scale's; `mix` holds every scale's weights.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = ChatUniVi.Config(clusters=(16, 8, 4), neighbours=(5, 3, 3))
    >>> stage, tokens, context = context_for(ChatUniVi, config, "projector", seed=0)
    >>> ChatUniVi.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (28, 64)

    Limits: the model was trained with these clusters; on others it is a training-free try. Distances are n x n. `at: encoder` clusters
    before the projector, as the official code does, and leaves the class token out. Its clustering of video frames into events is another
    method. Padding is nobody's neighbour and joins nothing.

    Where the official code differs: it adds noise of 1e-6 to the densities, which decides ties and, with at most 3 clusters (K becomes
    1), everything; here there is none and ties go to the lowest index. Its distance of a token to itself is up to 4e-3 instead of 0. It
    lowers K to `min(3, max(m // 2, 1))` by itself when K > m; here that takes that K in `neighbours`. The farthest distance is that of the
    batch item here and there.
    """

    paper = "Chat-UniVi, CVPR 2024, arXiv:2311.08046"
    official = "PKU-YuanGroup/Chat-UniVi@ec0b3db ChatUniVi/model/cluster.py:cluster_dpc_knn, CTM; ChatUniVi/model/arch.py:project"
    mechanism = "similarity"
    sites = ("encoder", "projector")

    samples = (
        Sample("projector", {"clusters": (12, 6, 3), "neighbours": (5, 3, 1)}, too_much={"clusters": (65, 6, 3)}),
        Sample("encoder", {"clusters": (20,), "neighbours": (4,)}, too_much={"clusters": (65,)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            clusters: tokens of each scale, never rising.
            neighbours: neighbours the density of each scale looks at, itself included.
        """

        clusters: tuple[int, ...] = Field(default=(64, 32, 16), min_length=1)
        neighbours: tuple[int, ...] = Field(default=(5, 3, 3), min_length=1)

        @model_validator(mode="after")
        def _sane(self) -> ChatUniVi.Config:
            if len(self.neighbours) != len(self.clusters):
                raise ValueError(
                    f"neighbours: {list(self.neighbours)} are {len(self.neighbours)} numbers for {len(self.clusters)} scales; give one "
                    "for each scale"
                )
            if min(*self.clusters, *self.neighbours) < 1 or list(self.clusters) != sorted(self.clusters, reverse=True):
                raise ValueError(f"clusters: {list(self.clusters)}, neighbours: {list(self.neighbours)}; at least 1 each, clusters falling")
            return self

    @staticmethod
    def stages(at: Site, config: ChatUniVi.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("chat_univi", at, "encoder", "projector")
        if at.layer is not None:
            raise ValueError(f"chat_univi acts after the whole encoder, not at {at}; write at: encoder, or at: projector")
        need_raster_encoder("chat_univi", at, facts)
        return (Stage(at),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: ChatUniVi.Config, facts: ModelFacts) -> Layout:
        """One visual run for each scale; the class token does not leave."""
        arriving = layout.tokens - layout.class_tokens
        for clusters, neighbours in zip(config.clusters, config.neighbours, strict=True):
            if max(clusters, neighbours) > arriving:
                asked = f"clusters: {clusters} with neighbours: {neighbours}"
                raise ValueError(f"{asked} of {arriving} tokens at {stage.at}; lower both to at most {arriving}")
            arriving = clusters
        return Layout(tuple(Segment("visual", count) for count in config.clusters), layout.width)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: ChatUniVi.Config) -> Compressed:
        """Cluster the patches, then the clusters."""
        import torch
        from torch.nn import functional

        from tmc_export.graphs._dpc import cluster_means, dpc_knn, euclidean_distances
        from tmc_export.graphs._ops import gather

        ChatUniVi.layout(stage, context.layout, config, context.facts)
        first = context.layout.class_tokens
        x, valid = tokens[:, first:].float(), context.valid[:, first:]
        scales, mixes, validity, chain = [], [], [], None
        source, assign = torch.zeros(0), torch.zeros(0)
        for count, neighbours in zip(config.clusters, config.neighbours, strict=True):
            found = dpc_knn(euclidean_distances(x), count, neighbours, valid)
            x, mix = cluster_means(x, found.assign, count, _EPS)
            valid = gather(valid, found.centres)
            if chain is None:
                source, assign = found.centres + first, functional.pad(found.assign, (first, 0), value=-1)
            chain = mix if chain is None else mix @ chain
            scales.append(x.to(tokens.dtype))
            mixes.append(chain)
            validity.append(valid)
        k = sum(config.clusters)
        return Compressed(
            torch.cat(scales, dim=1),
            functional.pad(source, (0, k - config.clusters[0]), value=-1),
            torch.cat(validity, dim=1),
            assign=assign,
            mix=functional.pad(torch.cat(mixes, dim=1), (first, 0)),
        )
