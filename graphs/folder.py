"""FOLDER: many ToMe rounds at one place, at the end of the encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    from tmc_export.graphs._bipartite import Pairs

__all__ = ["Folder"]

_KEYS = Keys()
_CLASS = Attention(layer="previous", rows="cls", heads="mean")
_ATTENTION_FACTOR = 100.0


@register("folder")
class Folder(Method):
    """FOLDER, all merging in the last block instead of a little in each.

    Paper: "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance", ICCV 2025, arXiv:2501.02430.

    To remove r tokens, rounds of `min((n - 1) // 2, what is left of r)`: even tokens join their most similar odd one (cosine, no
    epsilon), `x = sum(size * x) / sum(size)`, `size = sum(size)`.

    - `encoder`, `projector`: the tokens themselves are compared; they stay in spatial order; at the end `x * (1 + log(size))`, but for
      r <= (n - 1) // 2 only when r < (n - r) // 2.
    - `encoder.<l>.mid`: keys averaged over heads are compared, and `alpha * 100 * A[class, i]` is taken from the similarity of each even
      token i (A averaged over heads; joined tokens take the plain mean of their A). Out: the other even tokens, then the odd ones; no
      scale; later layers add `log(size)` to the attention logits of each key.

    Shapes (b batch, n candidates, k = n - r, c channels): tokens `[b, n, c]` -> `[b, k, c]`; state `size` `[b, k]` float32.

    >>> from tmc_export.graphs._synthetic import context_for
    >>> config = Folder.Config(keep=16)
    >>> stage, tokens, context = context_for(Folder, config, "projector", seed=0)
    >>> Folder.apply(stage, tokens, context, config).tokens.shape[1], tokens.shape[1]
    (16, 64)

    Limits: no raster afterwards. At least two tokens stay, because a round pairs at most (n - 1) // 2. `encoder.<l>.mid` needs one class
    token. Padding weighs nothing, joins last and is nobody's partner.

    Where the official code differs: its LLaVA variant stops below 40 tokens by a call that fails; here it goes on. The condition of the
    scale is the official one, which reads what is left of r after a fold: always on after a fold, off where a single round takes more
    than about a third. Its LLaVA patch acts in the last layer whose output is used (22 of 0 … 23).
    """

    paper = "FOLDER, ICCV 2025, arXiv:2501.02430"
    official = "anakin-skywalker-Joseph/Folder@d4750b9 folder.py:merge_features; llava/model/folder/{merge.py,patch/folder.py}"
    mechanism = "similarity"
    sites = ("projector", "encoder", "encoder.<l>.mid")

    samples = (
        Sample("projector", {"keep": 20}),
        Sample("encoder", {"keep": "70%"}),
        Sample("encoder.3.mid", {"keep": 25, "alpha": 0.02}),
    )

    class Config(MethodConfig):
        """Options.

        Attributes:
            keep: share or number of the visual tokens that stay; the class token is not counted.
            alpha: weight of the class attention at `encoder.<l>.mid`.
            scale: multiply by `1 + log(size)` at `encoder` and `projector`, as the official code does.
        """

        keep: Budget = Budget(share=0.5)
        alpha: float = Field(default=5.0, ge=0)
        scale: bool = True

    @staticmethod
    def stages(at: Site, config: Folder.Config, facts: ModelFacts) -> tuple[Stage, ...]:
        """One cut."""
        need_site("folder", at, "projector", "encoder", "encoder.mid")
        need_raster_encoder("folder", at, facts)
        if at.part == "encoder" and at.point is None and at.layer is not None:
            raise ValueError(f"folder folds the encoder's output or inside a layer, not at {at}; write at: encoder or at: {at}.mid")
        if at.part == "encoder" and facts.encoder.class_tokens > 1:
            raise ValueError(f"folder protects one class token, and there are {facts.encoder.class_tokens}; use at: projector")
        if at.point is None:
            return (Stage(at),)
        need_class_token("folder", facts)
        return (Stage(at, (_KEYS, _CLASS)),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Folder.Config, facts: ModelFacts) -> Layout:
        """The class token and `keep` visual tokens."""
        first = layout.class_tokens
        k = kept_of(config.keep, layout.tokens - first, stage.at)
        if sum(_rounds(layout.tokens, layout.tokens - first - k)) != layout.tokens - first - k:
            raise ValueError(f"keep: {k} of {layout.tokens - first} tokens at {stage.at}: folding stops at 2 tokens; keep at least 2")
        visual = layout.segments[-1] if k == layout.tokens - first else Segment("visual", k)
        return Layout((Segment("class", first), visual) if first else (visual,), layout.width, layout.positions)

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Folder.Config) -> Compressed:
        """Fold until `keep` tokens are left."""
        import torch

        from tmc_export.graphs._bipartite import averages, log_size, match_pairs
        from tmc_export.graphs._ops import gather

        inside, first = stage.at.point == "mid", context.layout.class_tokens
        b, n = tokens.shape[0], tokens.shape[1]
        removed = n - Folder.layout(stage, context.layout, config, context.facts).tokens
        x, size = tokens.float(), context.valid.float()
        metric = context.captured[_KEYS].float().mean(dim=2) if inside else x
        attention = context.captured[_CLASS].float().unsqueeze(2) if inside else None
        source = torch.arange(n).expand(b, n).contiguous()
        assign = source
        for r in _rounds(n, removed):
            penalty = None if attention is None else attention.squeeze(2) * (config.alpha * _ATTENTION_FACTOR)
            pairs = match_pairs(metric, r, size > 0, protect=bool(first), penalty=penalty)
            rows, into = _places(pairs, x.shape[1], in_order=not inside)
            if attention is not None:
                attention = _folded(attention, (size > 0).float(), pairs, rows)
                metric = _folded(metric, size, pairs, rows)
            x, size = _folded(x, size, pairs, rows), _folded_sizes(size, pairs, rows)
            metric = metric if inside else x
            source, assign = gather(source, rows), gather(into, assign)
        mix = averages(assign, context.valid.float(), n - removed)
        if config.scale and not inside and _scaled(n, removed):
            scale = (1.0 + log_size(size)).unsqueeze(2)
            x, mix = x * scale, mix * scale
        bias = log_size(size) if inside else None
        return Compressed(x.to(tokens.dtype), source, size > 0, assign=assign, mix=mix, state={"size": size}, key_bias=bias)


def _rounds(n: int, removed: int) -> list[int]:
    """Return the pairs of each round; they add up to less than `removed` when folding stops before.

    >>> _rounds(577, 433)
    [288, 144, 1]
    """
    rounds = []
    while removed > 0 and (n - 1) // 2 > 0:
        rounds.append(min((n - 1) // 2, removed))
        n, removed = n - rounds[-1], removed - rounds[-1]
    return rounds


def _scaled(n: int, removed: int) -> bool:
    """Return whether the official code scales: what is left of r after a fold, or r itself, is below half of what stays."""
    left = 0 if removed > (n - 1) // 2 else removed
    return removed > 0 and left < (n - removed) // 2


def _places(pairs: Pairs, n: int, *, in_order: bool) -> tuple[Tensor, Tensor]:
    """Return the token `[b, n-r]` that each row takes the place of, and the row `[b, n]` of every token."""
    import torch

    from tmc_export.graphs._bipartite import pair_rows
    from tmc_export.graphs._ops import gather, one_hot, partition

    if not in_order:
        return pair_rows(pairs, n)
    b, r = pairs.merged.shape
    stays = one_hot(pairs.merged * 2, n).amax(dim=1) == 0
    index = torch.arange(n, device=stays.device).expand(b, -1)
    onto = index.scatter(1, pairs.merged * 2, pairs.partner * 2 + 1)
    return partition(stays, n - r)[0], gather(stays.long().cumsum(dim=1) - 1, onto)


def _folded(values: Tensor, weight: Tensor, pairs: Pairs, rows: Tensor) -> Tensor:
    """Average joined tokens by weight `[b, n]` and put the rows `[b, n-r]` in place: `[b, n, c]` to `[b, n-r, c]`."""
    from tmc_export.graphs._bipartite import absorb
    from tmc_export.graphs._ops import gather

    return gather(_woven(values[:, 0::2], absorb(values, weight, pairs)[0]), rows)


def _folded_sizes(size: Tensor, pairs: Pairs, rows: Tensor) -> Tensor:
    """Add up joined sizes: `[b, n]` to `[b, n-r]`."""
    from tmc_export.graphs._bipartite import absorb
    from tmc_export.graphs._ops import gather

    value = size.unsqueeze(2)
    return gather(_woven(value[:, 0::2], absorb(value, size, pairs)[1].unsqueeze(2)), rows).squeeze(2)


def _woven(even: Tensor, odd: Tensor) -> Tensor:
    """Return even and odd tokens in turn: `[b, a, c]` and `[b, o, c]` to `[b, a + o, c]`."""
    import torch
    from torch.nn import functional

    n = even.shape[1] + odd.shape[1]
    padded = functional.pad(odd, (0, 0, 0, even.shape[1] - odd.shape[1]))
    return torch.stack([even, padded], dim=2).flatten(1, 2)[:, :n]
