"""FitPrune: delete a fitted number of visual tokens in every decoder layer, by self-attention times cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import field_validator

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import need_site, selected
from tmc_export.graphs._contract import Attention, Compressed, Context, Layout, Method, MethodConfig, Need, Sample, Site, Stage
from tmc_export.graphs._fitting import Evidence, Fitted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FitPrune", "score", "spared"]

_SELF = Attention(layer="previous", rows="visual", heads="max", row_sum=True)
_CROSS = Attention(layer="previous", rows="text", heads="max", row_sum=True)
_HALVINGS = 8
"""Of the interval in which the fitting looks for the share of mass: it is found to 1/256."""


@register("fitprune")
class FitPrune(Method):
    """FitPrune, a table of deletions per layer.

    Paper: "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models", AAAI 2025,
    arXiv:2409.10197.

    In layer l, with A the largest attention over its heads, V the n candidates and T the text tokens:
    `score_i = (sum over v in V of A[v, i] / n) * (sum over t in T of A[t, i])`; the `delete[l]` candidates of the smallest score go.
    The paper cuts the attention's output before the feed-forward; the feed-forward acts on each token by itself, so this is the cut after
    the layer, `decoder.<l+1>`: keys and values of layer l hold all its tokens either way.

    Shapes (b batch, n candidates, k kept, c channels): tokens `[b, n, c]` -> `[b, n - delete[l], c]` per stage; sums and score `[b, n]` in
    float32. Positions are kept. The KV of layer l holds what arrived at it.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = FitPrune.Config(delete=(0, 16, 0, 8))
    >>> [(str(stage.at), tokens.shape[1]) for stage, tokens, _ in contexts(FitPrune, config, "decoder.2")]
    [('decoder.2', 64), ('decoder.4', 48)]

    Fitting (`tmc-export fit`): with one share alpha for all layers and prompts, layer l gives up the candidates that are among the
    smallest of both sums, each taken as far as what stays holds at least `1 - alpha` of the sum that the layer has with all tokens (the
    self-attention sums as means over visual rows, which grow fewer);
    later layers then run without them. A bisection finds the smallest alpha whose table, the prompts' mean rounded down, leaves `flops` of
    the operations.

    Limits: `delete` is a table for one model and one number of tokens. Every layer that deletes is a cut, so that a fitted table makes
    about as many blocks as there are layers. Sums over all visual rows need the whole attention map of a layer, computed in blocks; the
    goal `flops` does not count that, `tmc-export plan` does.

    Where the official code differs: both its fitting and this one delete what both sums find small, and inference what the product finds
    small. Its fitting counts the operations of visual tokens only, stops deleting at the layer where the goal is met, ends at a step
    of 0.01, and takes the last alpha it tried, met or not; here operations are those of the plan, text included, and the goal is met. It
    reads text tokens behind the picture only; those before it see no visual token and add nothing. It takes one picture at 35; here every
    picture has its own choice. Of equal scores the lowest index goes first.
    """

    paper = "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models, AAAI 2025, arXiv:2409.10197"
    official = "ywh187/FitPrune@d28e418 LLaVA_1.5/llava/model/language_model/modeling_llama.py:LlamaAttention.forward"
    mechanism = "attention"
    budgets = "tokens deleted in each layer, fitted on a calibration set"
    sites = ("decoder.<k>",)
    query_aware = True
    fitted = ("at", "delete")
    goals = {"flops": 0.4}

    samples = (
        Sample("decoder.2", {"delete": (0, 24, 0, 16, 3)}, too_much={"delete": (0, 65, 0, 65, 65)}),
        Sample("decoder.1", {"delete": (63,)}, too_much={"delete": (64,)}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            delete: visual tokens deleted in each decoder layer, from layer 0 on; zeros at the end may be left out. `tmc-export fit`
                writes it; the published tables are for 32 layers and 576 tokens.
        """

        delete: tuple[int, ...] = ()

        @field_validator("delete")
        @classmethod
        def _counts(cls, value: tuple[int, ...]) -> tuple[int, ...]:
            if min(value, default=0) < 0:
                raise ValueError(f"delete counts tokens per layer, at least 0; got {list(value)}")
            return value

    @staticmethod
    def stages(at: Site, config: FitPrune.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut behind every layer that deletes."""
        need_site("fitprune", at, "decoder")
        depth = facts.decoder.layers
        layers = [layer for layer, count in enumerate(config.delete) if count]
        if not layers:
            raise ValueError(
                f"delete: {list(config.delete)} removes nothing; let tmc-export fit write it, or give the tokens to delete in each "
                "layer from layer 0 on, such as delete: [0, 64, 0, 32]"
            )
        if layers[-1] >= depth - 1:
            raise ValueError(
                f"delete: {config.delete[layers[-1]]} tokens in layer {layers[-1]}, and {facts.architecture} has {depth} decoder layers; "
                f"the last layer that can delete is {depth - 2}, because no later one would see the difference"
            )
        if at.layer != layers[0] + 1:
            raise ValueError(
                f"delete: {list(config.delete)} begins in layer {layers[0]}, which is cut at decoder.{layers[0] + 1}, not at {at}; "
                f"write at: decoder.{layers[0] + 1}"
            )
        return tuple(Stage(Site("decoder", layer + 1), (_SELF, _CROSS), index) for index, layer in enumerate(layers))

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: FitPrune.Config, facts: ModelFacts) -> Layout:
        """`n - delete[l]` tokens, positions kept."""
        layer = (stage.at.layer or 0) - 1
        count = config.delete[layer]
        if count >= layout.tokens:
            raise ValueError(
                f"delete: {count} tokens in layer {layer} leave none of the {layout.tokens} that arrive at {stage.at}; lower it to at most "
                f"{layout.tokens - 1}, or use vtw to withdraw all"
            )
        return selected(layout, layout.tokens - count)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: FitPrune.Config) -> Compressed:
        """Delete the candidates of the smallest score; padding goes first."""
        import torch

        from tmc_export.graphs._ops import gather, keep_top

        count = tokens.shape[1] - FitPrune.layout(stage, context.layout, config, context.facts).tokens
        small = -score(context)
        _, kept = keep_top(torch.where(context.valid, small, torch.full_like(small, 1.0)), count)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))

    @staticmethod
    def fit(config: FitPrune.Config, facts: ModelFacts, evidence: Evidence, goals: Mapping[str, float]) -> Fitted:
        """Find the table that leaves `goals["flops"]` of the decoder's operations."""
        goal = goals["flops"]
        stages = tuple(Stage(Site("decoder", layer + 1), (_SELF, _CROSS), layer) for layer in range(facts.decoder.layers - 1))
        if not stages:
            raise ValueError("the decoder has 1 layer, and no later one would see the difference; fit needs 2 or more")
        whole = _sums(stages, evidence)

        def table(alpha: float) -> tuple[tuple[int, ...], float]:
            found = _table(stages, evidence, whole, alpha)
            return found, evidence.operations(_site(found), {"delete": found}) if any(found) else 1.0

        low, high = 0.0, 1.0
        delete, share = table(high)
        if share > goal:
            raise ValueError(
                f"flops: {goal:.1%} of the decoder's operations cannot be reached, because text stays and 1 visual token per prompt: "
                f"{share:.1%} can; ask for more than that"
            )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found, left = table(middle)
            if left <= goal:
                high, delete, share = middle, found, left
            else:
                low = middle
        rows = tuple((str(layer), str(count)) for layer, count in enumerate(delete))
        rows += (("alpha", f"{high:.4f}"), ("operations left", f"{share:.1%}"))
        return Fitted(_site(delete), {"delete": delete}, ("layer", "deleted"), rows)


def score(context: Context) -> Tensor:
    """Return the product `[b, n]` of mean self-attention and summed cross-attention; at least 0."""
    own = context.captured[_SELF].float() / context.valid.shape[1]
    return own * context.captured[_CROSS].float()


def spared(own: Tensor, cross: Tensor, whole: tuple[float, float], alpha: float) -> Tensor:
    """Return the indices of the candidates that a layer keeps in fitting, ascending; at least one.

    Args:
        own: `[n]` means over visual rows, of the candidates that are left.
        cross: `[n]` sums over text rows.
        whole: both sums' totals in this layer with no token deleted anywhere.
        alpha: share of them that may go.
    """
    import torch

    gone = torch.ones_like(own, dtype=torch.bool)
    for sums, total in zip((own, cross), whole, strict=True):
        ordered, order = torch.sort(sums.double(), stable=True)
        left = ordered.flip(0).cumsum(0).flip(0) - ordered  # what stays when the smallest up to here go
        small = torch.zeros_like(gone)
        small[order[: int((left >= (1 - alpha) * total).sum())]] = True
        gone &= small
    if bool(gone.all()):
        gone[torch.argmax(own.double() * cross.double())] = False
    return torch.nonzero(~gone)[:, 0]


def _sums(stages: tuple[Stage, ...], evidence: Evidence) -> dict[tuple[int, int], tuple[float, float]]:
    """Prompt and layer -> totals of both sums, with no token deleted."""
    whole: dict[tuple[int, int], tuple[float, float]] = {}

    def visit(prompt: int, stage: Stage, captured: Mapping[Need, Tensor]) -> None:
        whole[prompt, stage.index] = float(_mean(captured).sum()), float(captured[_CROSS].double().sum())

    evidence.look(stages, visit)
    return whole


def _table(
    stages: tuple[Stage, ...], evidence: Evidence, whole: Mapping[tuple[int, int], tuple[float, float]], alpha: float
) -> tuple[int, ...]:
    """The prompts' mean deletions per layer, rounded down; zeros at the end are left out."""
    counts = [0] * len(stages)

    def visit(prompt: int, stage: Stage, captured: Mapping[Need, Tensor]) -> Tensor:
        own = _mean(captured)
        kept = spared(own, captured[_CROSS], whole[prompt, stage.index], alpha)
        counts[stage.index] += own.shape[0] - kept.shape[0]
        return kept

    evidence.look(stages, visit)
    found = [count // evidence.prompts for count in counts]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def _mean(captured: Mapping[Need, Tensor]) -> Tensor:
    """Self-attention `[n]`, the mean over the n visual rows that are left."""
    own = captured[_SELF].double()
    return own / own.shape[0]


def _site(delete: tuple[int, ...]) -> Site:
    """Where a table begins: behind the first layer that deletes."""
    return Site("decoder", next(layer for layer, count in enumerate(delete) if count) + 1)
