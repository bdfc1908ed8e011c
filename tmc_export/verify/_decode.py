"""The reference's decoder: Hugging Face layers called one by one, an explicit cache and explicit masks, no padding.

Legend: T new tokens, s keys, n candidates, k kept, c channels, r rotary axes, g KV heads, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Attention, Context, Need, TextEmbeds
from tmc_export.plan.types import CutPlan, Plan, StagePlan
from tmc_export.verify._apply import apply_stage, from_weights
from tmc_export.verify._learned import MethodWeights
from tmc_export.verify._queries import queries_of
from tmc_export.verify._towers import ReferenceModel
from tmc_export.verify._trace import BlockTrace, StageTrace

__all__ = ["Cache", "Decoder", "Tokens"]


class Cache:
    """Keys and values per layer, and the place in the conversation of every row. Layers call `update` as they call transformers' caches."""

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.orders = [torch.zeros(0, dtype=torch.int64) for _ in range(layers)]
        self.storing = True

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append `[1, g, T, d]` and return all rows; nothing is stored inside `peeking`."""
        old_key, old_value = self.keys[layer], self.values[layer]
        if old_key is not None and old_value is not None:
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        if self.storing:
            self.keys[layer], self.values[layer] = key, value
        return key, value

    @contextmanager
    def peeking(self) -> Iterator[None]:
        """Let a layer see the cache without leaving anything in it."""
        self.storing = False
        try:
            yield
        finally:
            self.storing = True

    def prune(self, layer: int, gone: Tensor) -> None:
        """Take the rows whose places are in `gone` out of a layer."""
        keep = ~torch.isin(self.orders[layer], gone)
        key, value = self.keys[layer], self.values[layer]
        if key is None or value is None:
            raise ExportError(f"KV rows of decoder layer {layer} are to be pruned before that layer has run; only earlier layers can be")
        self.keys[layer], self.values[layer] = key[:, :, keep], value[:, :, keep]
        self.orders[layer] = self.orders[layer][keep]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a turn at one depth.

    Attributes:
        hidden: `[1, T, c]`.
        positions: `[r, 1, T]` rotary positions.
        order: `[T]` places in the conversation.
        group: `[T]` 0 text, else the picture's number within the turn.
        source: `[T]` original index among the picture's uncompressed tokens (text: -1).
        arrival: `[T]` index among the picture's tokens (all pictures', at a cut with a joint stage) as they reached the last cut.
        joint: a stage saw all pictures at once, so that budgets per picture have no meaning any more.
    """

    hidden: Tensor
    positions: Tensor
    order: Tensor
    group: Tensor
    source: Tensor
    arrival: Tensor
    joint: bool = False

    def take(self, rows: Tensor) -> Tokens:
        """Return the tokens at `rows`."""
        return replace(
            self,
            hidden=self.hidden[:, rows],
            positions=self.positions[:, :, rows],
            order=self.order[rows],
            group=self.group[rows],
            source=self.source[rows],
            arrival=self.arrival[rows],
        )


@dataclass
class _Cut:
    """What the stages of one cut share: attention rows, the states of their recipe entries, and the rows to take from earlier KV."""

    weights: Mapping[Literal["previous", "next"], Tensor]
    columns: Tensor
    text: Tensor
    states: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    kv: dict[int, list[Tensor]] = field(default_factory=dict)


class Decoder:
    """A conversation's decoder state.

    Args:
        model: the loaded model.
        plan: where it is cut.
        noise: see `apply_stage`.
        trace: report the prompt at every block.
        learned: the weights of learned methods.
    """

    def __init__(self, model: ReferenceModel, plan: Plan, noise: float, trace: bool, learned: MethodWeights) -> None:
        self.model, self.plan, self.noise, self.trace, self.learned = model, plan, noise, trace, learned
        self.cuts = {c.layer: c for c in plan.cuts}
        self.starts = {b.first: b for b in plan.blocks}
        self.ends = {b.last - 1 for b in plan.blocks}
        half = next(model.head.parameters()).dtype != torch.float32
        self._hidden_key = -3.0e4 if half else float("-inf")
        self._weights: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        for cut in plan.cuts:
            if cut.attention("previous"):
                model.text.layers[cut.layer - 1].self_attn.register_forward_hook(self._record(cut.layer - 1))
        self.reset()

    def _record(self, layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            self._weights[layer] = output[1]

        return hook

    def reset(self) -> None:
        """Forget the conversation."""
        self.cache = Cache(len(self.model.text.layers))
        self.places = 0
        self.next_position: dict[int, int] = {}
        self.positions = torch.zeros(self.plan.rope_axes, 0, dtype=torch.int64)
        self.turn_visual = torch.zeros(0, dtype=torch.int64)
        self.stages: list[StageTrace] = []
        self.blocks: list[BlockTrace] = []

    def embed(self, ids: Tensor) -> Tensor:
        """Token table: `[T]` → `[1, T, c]`."""
        hidden: Tensor = self.model.text.embed_tokens(ids[None])
        return hidden

    def feed(
        self, hidden: Tensor, positions: Tensor | None, group: Tensor, source: Tensor, select: bool, following: int | None = None
    ) -> Tensor:
        """Run new tokens through all layers, and return the logits of the last one `[vocabulary]`.

        Args:
            hidden: `[1, T, c]`.
            positions: `[r, T]`, or None to count on.
            group: `[T]`.
            source: `[T]`, see `Tokens`.
            select: run the stages of the cuts; false while decoding and in turns without pictures.
            following: position of the token after these; the largest one plus one when None.
        """
        count = hidden.shape[1]
        if positions is None:
            positions = self._count_on(-1, count)
        else:
            self.next_position[-1] = int(positions.max()) + 1 if following is None else following
        self.positions = positions
        order = torch.arange(self.places, self.places + count)
        self.places += count
        tokens = Tokens(hidden, positions[:, None], order, group, source, _arrival(group, joint=False))
        text = hidden[:, group == 0]
        states: dict[tuple[int, int], dict[str, Tensor]] = {}
        opened = tokens
        for layer in range(len(self.model.text.layers)):
            if layer in self.cuts:
                tokens = self._cross(self.cuts[layer], tokens, text, states, select)
            if layer in self.starts:
                opened = tokens
            tokens = replace(tokens, hidden=self._layer(layer, tokens))
            if layer in self.ends and self.trace and count > 1:
                self._report(opened, tokens, layer)
        last = self.model.text.norm(tokens.hidden[:, -1:])
        logits: Tensor = self.model.head(last)[0, 0].float()
        return logits

    def _count_on(self, place: int, count: int) -> Tensor:
        """Positions `[r, count]` that go on where this stretch (-1: from the first layer, else from a renumbering cut) stopped."""
        start = self.next_position.get(place, 0)
        self.next_position[place] = start + count
        return torch.arange(start, start + count).expand(self.plan.rope_axes, -1)

    # ------------------------------------------------------------------------------------------------------------ layers
    def _layer(self, layer: int, tokens: Tokens) -> Tensor:
        found: list[Tensor] = []
        if self.trace and tokens.hidden.shape[1] > 1 and layer + 1 in self.cuts:
            with queries_of(self.model.text.layers[layer].self_attn, found):
                hidden = self._run(layer, tokens)
            self._queries[layer] = found[-1]
            return hidden
        return self._run(layer, tokens)

    def _run(self, layer: int, tokens: Tokens) -> Tensor:
        self.cache.orders[layer] = torch.cat([self.cache.orders[layer], tokens.order])
        out = self.model.text.layers[layer](
            tokens.hidden,
            attention_mask=self._mask(layer, tokens.order, self.cache.orders[layer], tokens.hidden.dtype),
            position_ids=None,
            past_key_values=self.cache,
            use_cache=True,
            position_embeddings=self._rotary(tokens),
        )
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def _mask(self, layer: int, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """Additive `[1, 1, T, s]`: a token sees those before it and itself, within the layer's window."""
        back = queries[:, None] - keys[None]
        seen = back >= 0
        window = self.plan.windows[layer] if self.plan.windows else None
        if window is not None:
            seen = seen & (back < window)
        return torch.where(seen, 0.0, self._hidden_key).to(dtype)[None, None]

    def _rotary(self, tokens: Tokens) -> Any:
        positions = tokens.positions if self.plan.rope_axes > 1 else tokens.positions[0]
        return self.model.text.rotary_emb(tokens.hidden, positions)

    def _next_weights(self, layer: int, tokens: Tokens) -> Tensor:
        """Attention `[1, h, T, s]` that a layer would compute on the tokens as they stand before it."""
        module = self.model.text.layers[layer]
        orders = torch.cat([self.cache.orders[layer], tokens.order])
        with self.cache.peeking():
            _, weights = module.self_attn(
                hidden_states=module.input_layernorm(tokens.hidden),
                attention_mask=self._mask(layer, tokens.order, orders, tokens.hidden.dtype),
                position_ids=None,
                past_key_values=self.cache,
                position_embeddings=self._rotary(tokens),
            )
        found: Tensor = weights
        return found

    # -------------------------------------------------------------------------------------------------------------- cuts
    def _cross(self, cut: CutPlan, tokens: Tokens, text: Tensor, states: dict[tuple[int, int], dict[str, Tensor]], select: bool) -> Tokens:
        """Run a cut's stages, if they are to run, and number the positions anew, if the cut does that."""
        if select and bool((tokens.group > 0).any()):
            weights: dict[Literal["previous", "next"], Tensor] = {}
            if cut.attention("previous"):
                weights["previous"] = self._weights[cut.layer - 1]
            if cut.attention("next"):
                weights["next"] = self._next_weights(cut.layer, tokens)
            shared = _Cut(weights, torch.arange(tokens.hidden.shape[1]), text, states)
            joint = tokens.joint or any(s.scope == "joint" for s in cut.stages)
            tokens = replace(tokens, arrival=_arrival(tokens.group, joint))
            for stage in cut.stages:
                tokens = self._stage(stage, tokens, shared)
            for layer, orders in shared.kv.items():
                self.cache.prune(layer, self.turn_visual[~torch.isin(self.turn_visual, torch.cat(orders))])
        if cut.positions != "keep":
            tokens = replace(tokens, positions=self._count_on(cut.layer, tokens.hidden.shape[1])[:, None])
        return tokens

    def _stage(self, stage: StagePlan, tokens: Tokens, cut: _Cut) -> Tokens:
        """Run one stage picture by picture, or on all at once, and put what is left back in order."""
        if stage.scope == "image" and tokens.joint:
            where = f"method '{stage.method}' at {stage.stage.at}"
            raise ExportError(f"{where} counts per picture, after a stage of scope joint mixed them; use scope: joint")
        joint = stage.scope == "joint"
        pictures = [0] if joint else sorted({int(g) for g in tokens.group if g > 0})
        stays = tokens.group == 0
        hidden = tokens.hidden.clone()
        for picture in pictures:
            rows = torch.nonzero(tokens.group > 0 if joint else tokens.group == picture)[:, 0]
            kept, values = self._one(stage, tokens, rows, picture, cut)
            stays[kept] = True
            hidden[:, kept] = values.to(hidden.dtype)
        rows = torch.nonzero(stays)[:, 0]
        cut.columns = cut.columns[rows]
        return replace(tokens, hidden=hidden, joint=joint or tokens.joint).take(rows)

    def _one(self, stage: StagePlan, tokens: Tokens, rows: Tensor, picture: int, cut: _Cut) -> tuple[Tensor, Tensor]:
        """Apply a stage to the tokens at `rows`; return the rows whose places are taken `[k]` and their new values `[1, k, c]`."""
        sizes = {v.tokens for v in self.plan.vision}  # a picture of a smaller bucket leaves places of the stage empty
        padding = stage.before.tokens - rows.shape[0] if stage.scope == "joint" or len(sizes) > 1 else 0
        padded = torch.cat([rows, rows[:1].expand(max(padding, 0))])
        valid = (torch.arange(padded.shape[0]) < rows.shape[0])[None]
        context = Context(
            layout=stage.before,
            facts=self.plan.facts,
            valid=valid,
            source=tokens.source[padded][None],
            positions=tokens.positions[:, :, padded],
            text=cut.text if any(isinstance(n, TextEmbeds) for n in stage.stage.needs) else None,
            text_valid=torch.ones(1, cut.text.shape[1], dtype=torch.bool),
            captured={n: self._columns(n, cut, padded, str(stage.stage.at)) for n in stage.stage.needs if not isinstance(n, TextEmbeds)},
            state=cut.states.get((stage.entry, picture), {}),
            weights=self.learned.of(stage),
        )
        applied = apply_stage(stage, tokens.hidden[:, padded], context, picture, self.noise)
        result = applied.result
        cut.states[stage.entry, picture] = dict(result.state)
        if bool((result.source < 0).any()) or bool((result.source[0].diff() <= 0).any()):
            where = f"method '{stage.method}' at {stage.stage.at}"
            raise ExportError(f"{where} returned sources that do not rise; in the decoder every token takes the place of a candidate")
        alive = result.valid[0]
        local = result.source[0][alive]
        arrival = tokens.arrival[rows]
        scores = applied.trace.scores if torch.equal(arrival[local], local) else None  # else `kept` counts in another order
        source = applied.trace.source[alive.numpy()]
        self.stages.append(replace(applied.trace, kept=arrival[local].numpy(), source=source, scores=scores))
        for layer, listed in result.kv.items():
            inside = listed[0][(listed[0] >= 0) & (listed[0] < rows.shape[0])]
            cut.kv.setdefault(layer, []).append(tokens.order[rows[inside]])
        return rows[local], result.tokens[:, alive]

    def _columns(self, need: Need, cut: _Cut, rows: Tensor, place: str) -> Tensor:
        """Attention over the candidates: the turn's own columns are the last ones of all keys."""
        if not isinstance(need, Attention) or need.rows == "cls":
            raise ExportError(f"the reference does not capture {need} at {place}; attention rows 'last' and 'all' and text embeddings are")
        weights = cut.weights[need.layer]
        past = weights.shape[-1] - weights.shape[-2]
        return from_weights(weights, need, place)[..., past + cut.columns[rows]]

    # ------------------------------------------------------------------------------------------------------------ report
    def _report(self, opened: Tokens, closed: Tokens, layer: int) -> None:
        block = next(b for b in self.plan.blocks if b.last - 1 == layer)
        count = closed.hidden.shape[1]

        def new(rows: Tensor | None) -> Any:
            if rows is None:
                raise ExportError(f"a decoder layer in block {block.index} kept nothing in its cache; the reference cannot report it")
            return rows[0, :, -count:].float().numpy().copy()

        layers = range(block.first, block.last)
        self.blocks.append(
            BlockTrace(
                first=block.first,
                last=block.last,
                hidden_in=opened.hidden[0].float().numpy().copy(),
                hidden_out=closed.hidden[0].float().numpy().copy(),
                positions=opened.positions[:, 0].numpy().copy(),
                order=opened.order.numpy().copy(),
                group=opened.group.numpy().copy(),
                keys={i: new(self.cache.keys[i]) for i in layers},
                values={i: new(self.cache.values[i]) for i in layers},
                queries={i: self._queries[i].float().numpy().copy() for i in layers if i in self._queries},
            )
        )


def _arrival(group: Tensor, joint: bool) -> Tensor:
    """Number every visual token within its picture, or within all of them: `[T]`."""
    if joint:
        return (group > 0).long().cumsum(0) - 1
    found = torch.zeros_like(group)
    for picture in {int(g) for g in group if g > 0}:
        mine = group == picture
        found[mine] = torch.arange(int(mine.sum()))
    return found
