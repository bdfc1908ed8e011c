"""MustDrop: merge alike windows in the encoder, mark key tokens at its end, drop what the prompt does not attend to in the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs import register
from tmc_export.graphs._checks import kept_of, need_class_token, need_grid, need_raster_encoder, need_site, selected
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

__all__ = ["MustDrop", "relevance"]

_ROWS = Attention(layer="previous", rows="text", heads="mean")
_TEXT = TextEmbeds()  # for which text rows are padding


@register("mustdrop")
class MustDrop(Method):
    """MustDrop, one method in the encoder, at its end and in the decoder.

    Paper: "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", arXiv:2411.10803.

    1. At `at` (after the first encoder layer: `encoder.1`): the patches in windows of R x C; a window's similarity is the mean cosine of
       its pairs, `sum over i != j of cos(x_i, x_j) / (m (m - 1))`, m = R C. The `merge` most alike windows become the mean of their tokens.
    2. At the end of the encoder, with A the class token's attention averaged over heads: the `ceil(key * n)` patches of the largest A are
       the key set, which is never dropped.
    3. After each of `layers` decoder layers, with A the attention of the text tokens averaged over heads: a token stays if it is key, or if
       `sum over t of A[t, i] >= g * sum of all` or if `max over t of A[t, i] >= e`. The number that stay is a budget here, so tokens are
       ranked by `max(sum_t A / (g * total), max_t A / e)`, key tokens first; with the number that the thresholds g and e leave, the same
       tokens stay.

    Shapes (b batch, n candidates with the class token first in the encoder, w windows merged, k kept, c channels): `[b, n, c]` ->
    `[b, n - w (m - 1), c]`: class token, merged windows by falling similarity, other patches in order; then `[b, n, c]` with the state
    `key` `[b, n - 1]` bool; then `[b, k, c]` in order. Cosines and scores in float32. Positions: the first of the sequence, `truncate`.

    >>> from tmc_export.graphs._synthetic import contexts
    >>> config = MustDrop.Config(window=(2, 2), merge="25%", layers=(3, 7), keep=("50%", "50%"))
    >>> [(str(stage.at), tokens.shape[1]) for stage, tokens, _ in contexts(MustDrop, config, "encoder.1")]
    [('encoder.1', 65), ('encoder', 53), ('decoder.3', 52), ('decoder.7', 26)]

    Limits: needs one class token and a raster that the windows tile. No other method may cut between its stages. Text rows at every cut.

    Where the official code differs: it merges every window above a similarity of 0.8, as many as the batch's least item has, and drops by
    the thresholds: both counts depend on the data, and its defaults (g = 1, e = 0) drop nothing; its scripts have 0.001 to 0.011. Its key
    set comes from the checkpoint's last layer, one behind the features in use: so it does here where there is such a layer, else from the
    last in use. After the prefill it also takes dropped tokens out of the KV of the layers between the cuts; here each layer keeps
    what ran through it. Its cosines have an epsilon of 1e-8. Ties go to the lowest index.
    """

    paper = "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model, arXiv:2411.10803"
    official = (
        "liuting20/MustDrop@909afa5 llava/model/multimodal_encoder/{local_merge.py:conditional_pooling,clip_encoder.py}, "
        "llava/model/language_model/modelling_sparse_llama.py:dual_attention_filter"
    )
    mechanism = "attention"
    sites = ("encoder.<l>",)
    query_aware = True
    budgets = "windows merged, and tokens kept at each decoder cut"

    samples = (Sample("encoder.1", {"window": (2, 2), "merge": "25%", "key": 6, "layers": (3, 7), "keep": ("50%", 20)}),)

    class Config(MethodConfig):
        """Options.

        Attributes:
            window: rows and columns of a window.
            merge: share or number of the windows that become one token each.
            key: share (rounded up) or number of the patches that are never dropped.
            layers: the decoder cuts, as layers that have run.
            keep: share of what arrives or number of tokens kept at each decoder cut, key tokens included.
            global_threshold: g, a share of all attention; only its ratio to the other matters.
            individual_threshold: e, an attention weight.
        """

        window: tuple[int, int] = (3, 3)
        merge: Budget = Budget(share=0.25)
        key: Budget = Budget(share=0.08)
        layers: tuple[int, ...] = (3, 7, 11, 15)
        keep: tuple[Budget, ...] = (Budget(share=0.75),) * 4
        global_threshold: float = Field(default=0.001, gt=0)
        individual_threshold: float = Field(default=0.001, gt=0)

    @staticmethod
    def stages(at: Site, config: MustDrop.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """Merge, mark, then one cut for each decoder layer."""
        need_site("mustdrop", at, "encoder")
        if at.layer is None:
            raise ValueError(f"mustdrop merges windows after an early layer, not at {at}; write at: encoder.1 (the paper's)")
        need_class_token("mustdrop", facts)
        need_raster_encoder("mustdrop", at, facts)
        layers, depth = config.layers, facts.decoder.layers
        if len(layers) != len(config.keep):
            raise ValueError(f"layers: {list(layers)} and keep: {len(config.keep)} budgets differ in number; give one keep for each layer")
        if list(layers) != sorted(set(layers)) or not all(1 <= layer < depth for layer in layers):
            raise ValueError(
                f"layers: {list(layers)} must rise, from 1 to at most {depth - 1}: {facts.architecture} has {depth} decoder layers; "
                "set layers"
            )
        cuts = (Stage(Site("decoder", layer), (_ROWS, _TEXT), index + 2, tied=True) for index, layer in enumerate(layers))
        return (Stage(at), Stage(Site("encoder"), (_class_row(facts),), 1), *cuts)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: MustDrop.Config, facts: ModelFacts) -> Layout:
        """Merged windows and the other patches; then all; then the kept ones, positions the first of the sequence."""
        if stage.index == 0:
            count, windows = _merged(layout, config, stage.at), config.window[0] * config.window[1]
            rest = layout.tokens - 1 - count * windows
            runs = (Segment("class", 1), Segment("visual", count), Segment("visual", rest))
            return Layout(tuple(run for run in runs if run.tokens), layout.width)
        if stage.index == 1:
            _keys(layout.tokens - layout.class_tokens, config, stage.at)
            return layout
        entered = layout.tokens if layout.entry_tokens is None else layout.entry_tokens
        k, keys = kept_of(config.keep[stage.index - 2], layout.tokens, stage.at), _keys(entered, config, stage.at)
        if k < keys:
            raise ValueError(
                f"keep: {k} tokens at {stage.at} are fewer than the {keys} key tokens, which are never dropped; raise keep or lower key"
            )
        return replace(selected(layout, k, "truncate"), entry_tokens=entered)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: MustDrop.Config) -> Compressed:
        """Merge windows, mark key tokens, or drop."""
        import torch

        from tmc_export.graphs._ops import chosen, gather, keep_top

        if stage.index == 0:
            return _merge_windows(tokens, context, config, stage.at)
        valid, (b, n) = context.valid, tokens.shape[:2]
        if stage.index == 1:
            first = context.layout.class_tokens
            row, live = context.captured[stage.needs[0]][:, first:], valid[:, first:]
            mark = chosen(row, _keys(n - first, config, stage.at), live) & live
            return Compressed(tokens, torch.arange(n).expand(b, n).contiguous(), valid, state={"key": mark})
        k, key = MustDrop.layout(stage, context.layout, config, context.facts).tokens, context.state["key"]
        if key.shape[1] != n:
            raise ValueError(
                f"mustdrop marked {key.shape[1]} tokens, and {n} arrive at {stage.at}; let no other method cut between its stages"
            )
        points = relevance(context.captured[_ROWS], context.text_valid, valid, config)
        kept, _ = keep_top(torch.where(key, torch.full_like(points, 1e30), points), k, valid)
        return Compressed(gather(tokens, kept), kept, gather(valid, kept), state={"key": gather(key, kept)})


def _class_row(facts: ModelFacts) -> Attention:
    """The class token's attention in the layer behind the features, where the checkpoint has one, else in the last in use."""
    return Attention(layer="next" if facts.encoder.spare else "previous", rows="cls", heads="mean")


def _keys(patches: int, config: MustDrop.Config, at: Site) -> int:
    """Return the size of the key set."""
    count = config.key.of(patches, "ceil")
    if count > patches:
        raise ValueError(f"key: {config.key} is more than the {patches} patches that arrive at {at}; lower key to at most {patches}")
    return count


def _merged(layout: Layout, config: MustDrop.Config, at: Site) -> int:
    """Return the number of windows that are merged."""
    rows, columns = need_grid("mustdrop", layout, at)
    high, wide = config.window
    if high < 1 or wide < 1 or high * wide < 2 or rows % high or columns % wide:
        raise ValueError(
            f"window: {list(config.window)} does not tile the {rows}x{columns} patches at {at}; choose rows that divide {rows} and columns "
            f"that divide {columns}, two patches at least"
        )
    windows = (rows // high) * (columns // wide)
    count = config.merge.of(windows, "floor")
    if count > windows or (count < 1 and config.merge.tokens is None):
        raise ValueError(f"merge: {config.merge} is {count} of the {windows} windows at {at}; set merge to 1 to {windows} windows")
    return count


def _windows(grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Return the patch numbers `[windows, m]` of every window, both in raster order."""
    import torch

    (rows, columns), (high, wide) = grid, window
    index = torch.arange(rows * columns).reshape(rows // high, high, columns // wide, wide)
    return index.transpose(1, 2).reshape(-1, high * wide)


def _merge_windows(tokens: Tensor, context: Context, config: MustDrop.Config, at: Site) -> Compressed:
    """Class token, the merged windows by falling similarity, the other patches in order."""
    import torch

    from tmc_export.graphs._ops import gather, one_hot, partition, top_in_order

    count, grid = _merged(context.layout, config, at), need_grid("mustdrop", context.layout, at)
    table = _windows(grid, config.window)
    (b, n), (windows, m), patches = tokens.shape[:2], table.shape, tokens[:, 1:]
    if count == 0:  # what the official code does when no window is alike; no recipe can ask for it
        index = torch.arange(n).expand(b, n).contiguous()
        return Compressed(tokens, index, context.valid, assign=index)
    flat = table.flatten()
    live = context.valid[:, 1:].index_select(1, flat).reshape(b, windows, m)
    chosen = top_in_order(_alike(patches.index_select(1, flat).reshape(b, windows, m, -1)), count, live.all(dim=2))
    members = table.index_select(0, chosen.flatten()).reshape(b, count * m)
    inside = one_hot(members, n - 1).amax(dim=1).bool()
    _, rest = partition(inside, count * m)
    source = torch.cat([torch.zeros(b, 1, dtype=torch.int64), members.reshape(b, count, m)[:, :, -1] + 1, rest + 1], dim=1)
    row = torch.arange(1, count + 1).repeat_interleave(m).expand(b, -1)
    behind = torch.arange(count + 1, source.shape[1]).expand(b, -1)
    where = torch.cat([members, rest], dim=1)
    assign = torch.zeros(b, n - 1, dtype=torch.int64).scatter(1, where, torch.cat([row, behind], dim=1))
    assign = torch.cat([torch.zeros(b, 1, dtype=torch.int64), assign], dim=1)
    weight = torch.where(torch.cat([torch.zeros_like(inside[:, :1]), inside], dim=1), context.valid.float(), 1.0)
    mix = one_hot(assign, source.shape[1]).transpose(1, 2) * weight.unsqueeze(1)
    size = mix.sum(dim=2, keepdim=True)
    mix = mix / size.clamp_min(1.0)
    merged = (mix[:, 1 : count + 1] @ tokens.float()).to(tokens.dtype)
    out = torch.cat([tokens[:, :1], merged, gather(patches, rest)], dim=1)
    valid = torch.cat([context.valid[:, :1], size[:, 1 : count + 1, 0] > 0, gather(context.valid[:, 1:], rest)], dim=1)
    return Compressed(out, source, valid, assign=assign, mix=mix)


def _alike(windows: Tensor) -> Tensor:
    """Return the mean cosine `[b, w]` of all pairs in windows `[b, w, m, c]`."""
    import torch

    from tmc_export.graphs._ops import cosine

    m = windows.shape[2]
    pairs = cosine(windows, windows) * (1.0 - torch.eye(m))
    return pairs.sum(dim=(2, 3)) / (m * (m - 1))


def relevance(rows: Tensor, text_valid: Tensor | None, valid: Tensor, config: MustDrop.Config) -> Tensor:
    """Return `[b, n]`, at least 1 where either threshold keeps a candidate.

    Args:
        rows: attention `[b, m, n]` of text tokens.
        text_valid: `[b, m]` bool, false for padding.
        valid: `[b, n]` bool.
        config: the thresholds.
    """
    import torch

    there = valid.unsqueeze(1) if text_valid is None else valid.unsqueeze(1) & text_valid.unsqueeze(2)
    rows = torch.where(there, rows.float(), torch.zeros_like(rows.float()))
    mass = rows.sum(dim=1)
    total = mass.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.maximum(mass / (total * config.global_threshold), rows.amax(dim=1) / config.individual_threshold)
