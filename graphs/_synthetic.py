"""Made-up inputs for any method at any site: what examples and the conformance suite call `apply` with.

Seeded, small, and shaped by the same facts, layouts and needs that the framework uses, so a new method is exercised without a line of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tmc_export.core.facts import DecoderFacts, EncoderFacts, ModelFacts
from tmc_export.graphs._contract import (
    Attention,
    Context,
    Features,
    Keys,
    Layout,
    Method,
    MethodConfig,
    Need,
    Segment,
    Site,
    Stage,
    TextEmbeds,
    TextTower,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["FACTS", "arriving_layout", "context_for", "contexts", "layouts", "small_facts"]

_TEXT_TOKENS, _TEXT_PADDING, _ELSEWHERE = 9, 2, 7
_HEADS = 4


def small_facts(grid: tuple[int, int] = (8, 8), class_tokens: int = 1, width: int = 96) -> ModelFacts:
    """Return the facts of a small made-up model: 4 encoder layers in use and one to spare, 28 decoder layers, patches of 4 pixels."""
    return ModelFacts(
        family="synthetic",
        architecture="SyntheticForConditionalGeneration",
        encoder=EncoderFacts(
            layers=4, width=32, heads=_HEADS, intermediate=64, patch=4, class_tokens=class_tokens, merge=1, grid=grid, spare=1
        ),
        decoder=DecoderFacts(
            layers=28,
            width=width,
            heads=_HEADS,
            kv_heads=2,
            head_dim=24,
            intermediate=128,
            vocabulary=512,
            rope_axes=1,
            tied=True,
            context=512,
        ),
        visual_grid=grid,
        image_token=511,
    )


FACTS = small_facts()


def arriving_layout(at: Site, facts: ModelFacts) -> Layout:
    """Return the layout of one uncompressed picture at `at`."""
    grid, patch = facts.encoder.grid, facts.encoder.patch
    if at.part == "input":
        pixels = (grid[0] * patch, grid[1] * patch)
        return Layout((Segment("visual", pixels[0] * pixels[1], pixels),), 3)
    if at.part == "encoder" or at.point == "replace":
        visual = Segment("visual", grid[0] * grid[1], grid)
        first = facts.encoder.class_tokens if at.part == "encoder" else 0  # the projector gets no class token
        return Layout((Segment("class", first), visual) if first else (visual,), facts.encoder.width)
    return Layout((Segment("visual", facts.visual_tokens, facts.visual_grid),), facts.decoder.width)


def _captured(need: Need, b: int, n: int, layout: Layout, facts: ModelFacts, draw: Generator) -> Tensor:
    import torch

    if isinstance(need, Attention):
        rows = {"text": (_TEXT_TOKENS,), "window": (need.window,)}.get(need.rows, ())
        heads = (_HEADS,) if need.heads == "none" else ()
        shape = (b, *heads, *(() if need.row_sum else rows), n)
        logits = torch.randn((*shape[:-1], n + _ELSEWHERE), generator=draw)  # rows look at other keys, too: no row of candidates sums to 1
        return (logits if need.logits else logits.softmax(-1) * (_HEADS if need.heads == "sum" else 1))[..., :n].contiguous()
    if isinstance(need, Keys):
        return torch.randn(b, n, _HEADS, 8, generator=draw)
    if isinstance(need, Features):
        return torch.randn(b, n, facts.encoder.width, generator=draw)
    if isinstance(need, TextEmbeds):
        return torch.randn(b, _TEXT_TOKENS, facts.decoder.width, generator=draw)
    if isinstance(need, TextTower):
        return torch.randn(b, need.width, generator=draw)
    raise ValueError(f"no made-up input for the need {need!r}; add one to graphs/_synthetic.py")


def _context(stage: Stage, b: int, layout: Layout, facts: ModelFacts, draw: Generator, weights: Mapping[str, Tensor]) -> Context:
    import torch

    n = layout.tokens
    source = torch.arange(n).expand(b, n).contiguous()
    positions = None
    if stage.at.part in ("decoder", "step", "prefill_end"):
        positions = (source + 5).expand(facts.decoder.rope_axes, b, n).contiguous()
    text = any(isinstance(need, TextEmbeds) for need in stage.needs)
    rows = any(isinstance(need, Attention) and need.rows == "text" and not need.row_sum for need in stage.needs)
    return Context(
        layout=layout,
        facts=facts,
        valid=torch.ones(b, n, dtype=torch.bool),
        source=source,
        positions=positions,
        text=torch.randn(b, _TEXT_TOKENS, facts.decoder.width, generator=draw) if text else None,
        text_valid=(torch.arange(_TEXT_TOKENS) < _TEXT_TOKENS - _TEXT_PADDING).expand(b, -1).contiguous() if text or rows else None,
        captured={need: _captured(need, b, n, layout, facts, draw) for need in stage.needs},
        weights=weights,
    )


def layouts(
    method: type[Method], config: MethodConfig, at: str | Site, facts: ModelFacts = FACTS, arriving: Layout | None = None
) -> Iterator[tuple[Stage, Layout, Layout]]:
    """Yield `(stage, what arrives, what leaves)` for every stage of a recipe entry, without torch.

    `arriving` replaces the layout of one uncompressed picture at the first stage.

    Raises:
        ValueError: the method refuses the site, the facts or the budget.
    """
    stages = method.stages(at if isinstance(at, Site) else Site.parse(at), config, facts)
    layout = arriving or arriving_layout(stages[0].at, facts)
    for stage in stages:
        if layout.width != (width := arriving_layout(stage.at, facts).width):  # past the projector: no class token, other channels
            layout = Layout(tuple(s for s in layout.segments if s.kind == "visual"), width)
        leaving = method.layout(stage, layout, config, facts)
        yield stage, layout, leaving
        layout = leaving


def contexts(
    method: type[Method],
    config: MethodConfig,
    at: str | Site,
    *,
    batch: int = 1,
    seed: int = 0,
    facts: ModelFacts = FACTS,
    arriving: Layout | None = None,
) -> Iterator[tuple[Stage, Tensor, Context]]:
    """Yield `(stage, tokens [b, n, c], context)` for every stage of a recipe entry; later stages get what the earlier ones returned.

    See `layouts` for `arriving` and what is raised.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    shapes: Mapping[str, Any] = method.weights(config, facts)
    weights = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}
    tokens: Tensor | None = None
    state: Mapping[str, Tensor] = {}
    for stage, layout, _ in layouts(method, config, at, facts, arriving):
        if tokens is None or tokens.shape[1:] != (layout.tokens, layout.width):
            tokens = torch.randn(batch, layout.tokens, layout.width, generator=draw)
        context = replace(_context(stage, batch, layout, facts, draw, weights), state=state)
        yield stage, tokens, context
        out = method.apply(stage, tokens, context, config)
        tokens, state = out.tokens, out.state


def context_for(
    method: type[Method],
    config: MethodConfig,
    at: str | Site,
    *,
    index: int = 0,
    batch: int = 1,
    seed: int = 0,
    facts: ModelFacts = FACTS,
    arriving: Layout | None = None,
) -> tuple[Stage, Tensor, Context]:
    """Return `(stage, tokens, context)` of stage number `index` of a recipe entry; see `contexts`."""
    found = list(contexts(method, config, at, batch=batch, seed=seed, facts=facts, arriving=arriving))
    if index >= len(found):
        raise ValueError(f"{method.name} at {at} has {len(found)} stages, there is no number {index}")
    return found[index]
