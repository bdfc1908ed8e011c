"""The reference's decoder: Hugging Face layers called one by one, an explicit cache and explicit masks, no padding.

Legend: T new tokens, s keys, n candidates, k kept, c channels, r rotary axes, g KV heads, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tmc_export.bundle.program import SlotCodes
from tmc_export.core.errors import ExportError, RuntimeInputError
from tmc_export.graphs._contract import Attention, Context, Need, TextEmbeds
from tmc_export.plan.types import CutPlan, Plan, StagePlan
from tmc_export.verify._apply import apply_stage
from tmc_export.verify._cache import Cache
from tmc_export.verify._learned import MethodWeights
from tmc_export.verify._queries import queries_of
from tmc_export.verify._rows import LayerMap, picked_rows
from tmc_export.verify._sequence import Tokens, leave, number_candidates, rows_that_leave, side_by_side
from tmc_export.verify._towers import ReferenceModel
from tmc_export.verify._trace import BlockTrace, StageTrace

__all__ = ["Decoder", "Watcher"]

Watcher = Callable[[LayerMap, Tokens], Tensor | None]


@dataclass
class _Cut:
    """What the stages of one cut share: attention maps, places and groups of the tokens that arrived, their text, the states of recipe
    entries, and the places to leave in earlier KV."""

    maps: Mapping[Literal["previous", "next"], LayerMap]
    order: Tensor
    group: Tensor
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
        codes: how the cache keeps rows; see `Cache`.
    """

    def __init__(
        self, model: ReferenceModel, plan: Plan, noise: float, trace: bool, learned: MethodWeights, codes: SlotCodes | None = None
    ) -> None:
        self.model, self.plan, self.noise, self.trace, self.learned, self.codes = model, plan, noise, trace, learned, codes
        self.cuts = {c.layer: c for c in plan.cuts}
        self.starts = {b.first: b for b in plan.blocks}
        self.ends = {b.last - 1 for b in plan.blocks}
        half = next(model.head.parameters()).dtype != torch.float32
        self._hidden_key = -3.0e4 if half else float("-inf")
        self._weights: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._hooks: dict[int, Any] = {}
        self._watchers: dict[int, Watcher] = {}
        for cut in plan.cuts:
            if cut.attention("previous"):
                self._hook(cut.layer - 1)
        self.reset()

    def _hook(self, layer: int) -> None:
        if layer not in self._hooks:
            self._hooks[layer] = self.model.text.layers[layer].self_attn.register_forward_hook(self._record(layer))

    def watch(self, watchers: Mapping[int, Watcher]) -> None:
        """Show the attention map of these layers, and the tokens that leave them, to a function; no cut may follow them directly.

        Args:
            watchers: by layer; each returns the rows that go on to the next layer, or None for all. They replace earlier ones.
        """
        for layer in watchers:
            if layer + 1 in self.cuts:
                raise ExportError(f"decoder layer {layer} cannot be looked at: the plan cuts behind it, and the cut would see other tokens")
            self._hook(layer)
        self._watchers = dict(watchers)

    def close(self) -> None:
        """Leave the model alone: another decoder is going to use it."""
        for hook in self._hooks.values():
            hook.remove()

    def _record(self, layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            self._weights[layer] = output[1]

        return hook

    def reset(self) -> None:
        """Forget the conversation."""
        self.cache = Cache(len(self.model.text.layers), self.codes)
        self.since = 0
        self._since = torch.zeros(0, dtype=torch.int64)
        self.places = 0
        self.next_position: dict[int, int] = {}
        self.positions = torch.zeros(self.plan.rope_axes, 0, dtype=torch.int64)
        self.turn_visual = torch.zeros(0, dtype=torch.int64)
        self.turn_states: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.turn_texts: dict[int, Mapping[Need, Tensor]] = {}
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
        following = self._hide(group, order)
        tokens = Tokens(hidden, positions[:, None], order, group, source, number_candidates(group, joint=False), torch.arange(count))
        states = dict(self.turn_states) if select else {}
        opened = tokens
        for layer in range(len(self.model.text.layers)):
            if layer in self.cuts:
                tokens = self._cross(self.cuts[layer], tokens, states, select)
            if layer in self.starts:
                opened = tokens
            tokens = replace(tokens, hidden=self._layer(layer, tokens))
            if select and layer in self._watchers:
                rows = self._watchers[layer](self._previous_map(layer, tokens), tokens)
                tokens = tokens if rows is None else tokens.take(rows)
            if layer in self.ends and self.trace and count > 1:
                self._report(opened, tokens, layer)
        if following > self.since:
            for layer in range(len(self.model.text.layers)):
                self.cache.prune(layer, order[order < following])
            self.since = following
        last = self.model.text.norm(tokens.hidden[:, -1:])
        logits: Tensor = self.model.head(last)[0, 0].float()
        return logits

    def _hide(self, group: Tensor, order: Tensor) -> int:
        """Note the first place that each new token sees, and return the first that later tokens see: what the plan's barriers hide."""
        barrier, first = max((v.barrier for v in self.plan.vision), default=0), self.since
        self._since = torch.zeros_like(order)
        for row in range(order.shape[0]):
            if barrier and row and group[row - 1] > 0 and group[row] != group[row - 1]:
                first = int(order[row - barrier])
            self._since[row] = first
        return int(order[-barrier]) if barrier and group[-1] > 0 else first

    def _count_on(self, place: int, count: int) -> Tensor:
        """Positions `[r, count]` that go on where this stretch (-1: from the first layer, else from a renumbering cut) stopped."""
        start = self.next_position.get(place, 0)
        self.next_position[place] = start + count
        return torch.arange(start, start + count).expand(self.plan.rope_axes, -1)

    # ------------------------------------------------------------------------------------------------------------ layers
    def _layer(self, layer: int, tokens: Tokens) -> Tensor:
        cut = self.cuts.get(layer + 1)
        products = cut is not None and any(n.logits for n in cut.attention("previous"))
        if cut is None or not (products or (self.trace and tokens.hidden.shape[1] > 1)):
            return self._run(layer, tokens)
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        with queries_of(self.model.text.layers[layer].self_attn, queries, keys):
            hidden = self._run(layer, tokens)
        self._queries[layer], self._keys[layer] = queries[-1], keys[-1]
        return hidden

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
        if any(v.barrier for v in self.plan.vision):
            seen = seen & (keys[None] >= self._since[:, None])
        window = self.plan.windows[layer] if self.plan.windows else None
        if window is not None:
            seen = seen & (back < window)
        return torch.where(seen, 0.0, self._hidden_key).to(dtype)[None, None]

    def _rotary(self, tokens: Tokens) -> Any:
        positions = tokens.positions if self.plan.rope_axes > 1 else tokens.positions[0]
        return self.model.text.rotary_emb(tokens.hidden, positions)

    def _seen(self, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
        return self._mask(layer, queries, keys, torch.float32)[0, 0] == 0

    def _previous_map(self, layer: int, tokens: Tokens) -> LayerMap:
        """What a layer that has run computed for the tokens that left it."""
        seen = self._seen(layer, tokens.order, self.cache.orders[layer])
        return LayerMap(self._weights[layer][0], seen, self._queries.get(layer), self._keys.get(layer))

    def _next_map(self, layer: int, tokens: Tokens) -> LayerMap:
        """What a layer would compute on the tokens as they stand before it."""
        module = self.model.text.layers[layer]
        orders = torch.cat([self.cache.orders[layer], tokens.order])
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        with self.cache.peeking(), queries_of(module.self_attn, queries, keys):
            _, weights = module.self_attn(
                hidden_states=module.input_layernorm(tokens.hidden),
                attention_mask=self._mask(layer, tokens.order, orders, tokens.hidden.dtype),
                position_ids=None,
                past_key_values=self.cache,
                position_embeddings=self._rotary(tokens),
            )
        return LayerMap(weights[0], self._seen(layer, tokens.order, orders), queries[-1], keys[-1])

    # -------------------------------------------------------------------------------------------------------------- cuts
    def _cross(self, cut: CutPlan, tokens: Tokens, states: dict[tuple[int, int], dict[str, Tensor]], select: bool) -> Tokens:
        """Run a cut's stages, if they are to run, and number the positions anew, if the cut does that."""
        arrived = tokens.positions
        if select and bool((tokens.group > 0).any()):
            maps: dict[Literal["previous", "next"], LayerMap] = {}
            if cut.attention("previous"):
                maps["previous"] = self._previous_map(cut.layer - 1, tokens)
            if cut.attention("next"):
                maps["next"] = self._next_map(cut.layer, tokens)
            shared = _Cut(maps, tokens.order, tokens.group, tokens.hidden[:, tokens.group == 0], states)
            joint = tokens.joint or any(s.scope == "joint" for s in cut.stages)
            count = tokens.hidden.shape[1]
            tokens = replace(tokens, arrival=number_candidates(tokens.group, joint), column=torch.arange(count))
            for stage in cut.stages:
                tokens = self._stage(stage, tokens, shared)
            if not tokens.hidden.shape[1]:
                raise RuntimeInputError(f"nothing is left of the prompt behind the cut at layer {cut.layer}; write a question")
            for layer, orders in shared.kv.items():
                self.cache.prune(layer, self.turn_visual[~torch.isin(self.turn_visual, torch.cat(orders))])
        if cut.positions == "truncate" and select:
            first = arrived[:, :, : tokens.hidden.shape[1]]
            self.next_position[cut.layer] = int(first.max()) + 1
            return replace(tokens, positions=first)
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
        pieces = [tokens.take(torch.nonzero(tokens.group == 0)[:, 0])]
        for layer in stage.after.kv_rows:
            cut.kv.pop(layer, None)  # what a stage before it at this cut named is named anew
        for picture in pictures:
            rows = torch.nonzero(tokens.group > 0 if joint else tokens.group == picture)[:, 0]
            left, text = self._one(stage, tokens, rows, picture, cut)
            pieces.append(left)
            if text is not None:
                pieces[0] = replace(pieces[0], hidden=text.to(tokens.hidden.dtype))
        return replace(side_by_side(pieces), joint=joint or tokens.joint)

    def _one(self, stage: StagePlan, tokens: Tokens, rows: Tensor, picture: int, cut: _Cut) -> tuple[Tokens, Tensor | None]:
        """Apply a stage to the tokens at `rows`; return what leaves, and the text tokens `[1, m, c]` where it replaces them."""
        where = f"method '{stage.method}' at {stage.stage.at}"
        sizes = {v.tokens for v in self.plan.vision}  # a picture of a smaller bucket leaves places of the stage empty
        count = rows.shape[0]
        padding = stage.before.tokens - count if stage.scope == "joint" or len(sizes) > 1 else 0
        padded = torch.cat([rows, rows[:1].expand(max(padding, 0))])
        valid = (torch.arange(padded.shape[0]) < count)[None]
        texts = self.turn_texts.get(picture, {})
        wanted = [n for n in stage.stage.needs if not isinstance(n, TextEmbeds)]
        context = Context(
            layout=stage.before,
            facts=self.plan.facts,
            valid=valid,
            source=tokens.source[padded][None],
            positions=tokens.positions[:, :, padded],
            text=cut.text if any(isinstance(n, TextEmbeds) for n in stage.stage.needs) else None,
            text_valid=torch.ones(1, cut.text.shape[1], dtype=torch.bool),
            captured={n: texts[n] if n in texts else self._columns(n, cut, tokens, padded, where) for n in wanted},
            state=cut.states.get((stage.entry, picture), {}),
            weights=self.learned.of(stage),
        )
        applied = apply_stage(stage, tokens.hidden[:, padded], context, picture, self.noise)
        result = applied.result
        cut.states[stage.entry, picture] = dict(result.state)
        alive, listed = rows_that_leave(result, count, where)
        left = leave(tokens, rows, listed, result.tokens[:, alive])
        real, source = left.arrival >= 0, result.source[0][alive]
        scores = applied.trace.scores if torch.equal(left.arrival[real], source[real]) else None  # else `kept` counts in another order
        self.stages.append(replace(applied.trace, kept=left.arrival.numpy(), source=applied.trace.source[alive.numpy()], scores=scores))
        for layer, named in result.kv.items():
            inside = rows[named[0][(named[0] >= 0) & (named[0] < count)]]
            if bool((tokens.arrival[inside] < 0).any()):
                raise ExportError(
                    f"{where} names a token for the KV of layer {layer} that a stage of the same cut made; no layer has seen it"
                )
            cut.kv.setdefault(layer, []).append(cut.order[tokens.column[inside]])
        return left, result.text

    def _columns(self, need: Need, cut: _Cut, tokens: Tokens, rows: Tensor, place: str) -> Tensor:
        """Attention over the candidates: the turn's own columns are the last ones of all keys."""
        if not isinstance(need, Attention):
            raise ExportError(f"the reference does not capture {need} at {place}; attention rows and text embeddings are")
        if bool((tokens.arrival[rows] < 0).any()):
            raise ExportError(f"{place} asks for attention on tokens that a stage of the same cut made; no layer has seen them")
        layer = cut.maps[need.layer]
        past = layer.seen.shape[1] - layer.seen.shape[0]
        return picked_rows(layer, need, cut.group, place)[..., past + tokens.column[rows]]

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
