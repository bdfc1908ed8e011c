"""The compress subgraph between two blocks: scores on the side, the method, and the sequence put together again.

Inputs, in order: `hidden [b, S, c]`, `positions [r, b, S]`, `order [b, S]`, `valid [b, S]`, `group [b, S]` (0 text, else picture 1…m),
`candidates [b, m·v]` (places of the visual tokens in S), `candidate_valid [b, m·v]`, `last [b]`; where a stage reads the text:
`text_places [b, t]` (places of the text tokens in S, in order) and `text_valid [b, t]`; for attention of the layer before:
`slots [b, S]` (KV slot of each token), `slot_order`, `slot_valid` `[b, C]`, `query.<l>` and `key.<l>` `[b, g, C, d]`, or
`sums.<l>.<n> [b, S]` where that layer's block adds up its map itself (`plan.sums`); for attention of the layer after: `next_order`,
`next_valid` `[b, C']` and `next_key.<l>` `[b, g, C', d]` (what earlier turns left in the next block); then `past_state.<entry>.<name>`,
what a recipe entry's last stage in an earlier graph left, and `text.<n>` `[b·m, width]`, what a text tower made of each picture's question.
Outputs: `hidden_out [b, S', c]`, `source` and `place` `[b, S']` (which token of S a token has its rotary position, and its place in the
conversation, from; see `sequence`), `valid_out [b, S']`, then per stage `kept.<n>` `[b, m·k]` (index among the arriving candidates, -2
synthetic, -1 none; a stage that leaves no token has no such output), `kv.<l>` `[b, S]` where the method prunes KV of an earlier layer, and
`state.<entry>.<name>` for a later cut.
The KV of the whole turn is in the slots when this graph runs, so that the scores do not depend on bucket, chunking or context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Compressed, Context, Need, TextEmbeds, TextTower
from tmc_export.plan.rows import text_places
from tmc_export.plan.types import CutPlan, StagePlan, TowerPlan
from tmc_export.surgery._rows import KeySide, QuerySide, row_scores
from tmc_export.surgery._states import Handed, StateBook, by_entry
from tmc_export.surgery._sums import sum_name
from tmc_export.surgery.attention import AttentionState, expand_heads, recording
from tmc_export.surgery.learned import Learned
from tmc_export.surgery.sequence import Candidates, arriving, assemble, leave, members
from tmc_export.surgery.stages import captured_or_raise, gather_rows, run_stage, text_inputs, texts_by_need

if TYPE_CHECKING:
    from tmc_export.families._contract import DecoderParts

__all__ = ["Cut"]


@dataclass(frozen=True)
class _Turn:
    """The turn as it reaches the cut; shapes as in the module's description."""

    hidden: Tensor
    positions: Tensor
    order: Tensor
    valid: Tensor
    last: Tensor
    text: Tensor  # [b, S] bool
    places: Tensor  # [b, t] of the text tokens, no columns where nobody reads them
    places_valid: Tensor


class Cut(nn.Module):
    """All stages between two blocks.

    Args:
        parts: the family's decoder.
        plan: the cut.
        images: pictures in the bucket.
        facts: the model's numbers.
        windows: per decoder layer, its sliding window or None.
        dtype: of learned weights.
        entering: states that earlier graphs hand to the stages here.
        leaving: recipe entries whose state a later cut reads.
        towers: what stages ask text towers for, in the order of the towers.
    """

    def __init__(
        self,
        parts: DecoderParts,
        plan: CutPlan,
        images: int,
        facts: ModelFacts,
        windows: tuple[int | None, ...],
        dtype: torch.dtype = torch.float32,
        entering: Sequence[Handed] = (),
        leaving: tuple[int, ...] = (),
        towers: Mapping[TextTower, TowerPlan] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.learned = Learned(plan.stages, dtype)
        self._parts, self.plan, self.images, self.facts, self.windows = parts, plan, images, facts, windows
        self.previous, self.next = plan.scored("previous"), plan.attention("next")
        self.text_places = text_places(plan)
        self.entering, self.states, self.towers = tuple(entering), StateBook(leaving), dict(towers)
        self.scored_layer = parts.layers[plan.layer] if self.next else None

    def input_names(self) -> list[str]:
        """Names of the inputs, in the order of `forward`."""
        names = ["hidden", "positions", "order", "valid", "group", "candidates", "candidate_valid", "last"]
        if self.text_places:
            names += ["text_places", "text_valid"]
        if self.previous:
            layer = self.plan.layer - 1
            names += ["slots", "slot_order", "slot_valid", f"query.{layer}", f"key.{layer}"]
        names += [sum_name(self.plan.layer - 1, n) for n in range(len(self.plan.summed))]
        if self.next:
            names += ["next_order", "next_valid", f"next_key.{self.plan.layer}"]
        return names + [h.input for h in self.entering] + text_inputs(self.towers)

    def output_names(self) -> list[str]:
        """Names of the outputs, in the order of `forward`; those of states are known once it has run."""
        kept = [f"kept.{n}" for n, stage in enumerate(self.plan.stages) if stage.after.tokens]
        names = ["hidden_out", "source", "place", "valid_out", *kept]
        names += [f"kv.{layer}" for layer in sorted({i for s in self.plan.stages for i in s.after.kv_rows})]
        return names + self.states.output_names()

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        order: Tensor,
        valid: Tensor,
        group: Tensor,
        candidates: Tensor,
        candidate_valid: Tensor,
        last: Tensor,
        *side: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compress one turn's visual tokens; shapes as in the module's description."""
        given = dict(zip(self.input_names()[8:], side, strict=True))
        places, places_valid = given.get("text_places", candidates[:, :0]), given.get("text_valid", candidate_valid[:, :0])
        turn = _Turn(hidden, positions, order, valid, last, valid & (group == 0), places, places_valid)
        scores = self._previous_scores(turn, given)
        scores |= {need: given[sum_name(self.plan.layer - 1, n)].float() for n, need in enumerate(self.plan.summed)}
        scores |= self._next_scores(turn, given)
        texts = texts_by_need(self.towers, [given[name] for name in text_inputs(self.towers)])
        left: Candidates | None = arriving(hidden, candidates, candidate_valid)
        states = by_entry(self.entering, [given[h.input] for h in self.entering])
        kept: list[Tensor] = []
        kv: dict[int, Tensor] = {}
        for stage in self.plan.stages:
            if left is None or stage.after.tokens == 0:  # nothing to compute: only the text goes on
                left = None
                continue
            result = self._run(stage, turn, left, scores, texts, states)
            if result.text is not None:
                row = (turn.text.long().cumsum(1) - 1).clamp(0, result.text.shape[1] - 1)  # which of the text tokens stands here
                hidden = torch.where(turn.text[:, :, None], gather_rows(result.text.to(hidden.dtype), row), hidden)
            for layer, rows in result.kv.items():
                chosen = self._unfold_index(stage, rows, left.place)
                listed = (left.alive & (left.index >= 0)).gather(1, chosen) & (rows >= 0).reshape(chosen.shape)
                kv[layer] = members(left.origin.gather(1, chosen), listed, hidden.shape[1])
            left = leave(left, result, self._fold(stage))
            kept.append(left.report())
        items = {s.entry: hidden.shape[0] * self._fold(s) for s in self.plan.stages}
        handed = self.states.hand_on(states, items)
        whole = assemble(hidden, turn.text, left, self.plan.tokens_out)
        return (*whole, *kept, *[kv[layer] | turn.text for layer in sorted(kv)], *handed)

    # ------------------------------------------------------------------------------------------------- one stage
    def _run(
        self,
        stage: StagePlan,
        turn: _Turn,
        left: Candidates,
        scores: dict[Need, Tensor],
        texts: dict[Need, Tensor],
        states: dict[int, dict[str, Tensor]],
    ) -> Compressed:
        """Run a stage on every picture by itself, or on all of them (`joint`); `states` gets what it hands on."""
        fold = self._fold(stage)
        batch, count = left.place.shape
        axes = turn.positions.shape[0]
        at_place = turn.positions.gather(2, left.origin[None].expand(axes, -1, -1)).reshape(axes, batch * fold, count // fold)
        captured = {n: _fold_columns(s.gather(-1, _like(left.origin, s)), fold) for n, s in scores.items()}
        wanted = tuple(n for n in stage.stage.needs if not isinstance(n, TextEmbeds))
        wants_text, rows = any(isinstance(n, TextEmbeds) for n in stage.stage.needs), turn.places_valid
        context = Context(
            layout=stage.before,
            facts=self.facts,
            valid=left.alive.reshape(batch * fold, -1),
            source=torch.arange(count // fold).expand(batch * fold, count // fold),
            positions=at_place,
            text=(gather_rows(turn.hidden, turn.places) * rows[:, :, None]).repeat_interleave(fold, 0) if wants_text else None,
            text_valid=rows.repeat_interleave(fold, 0) if rows.shape[1] else None,
            captured=captured_or_raise({**captured, **texts}, wanted, str(stage.stage.at)),
            state=states.get(stage.entry, {}),
            weights=self.learned.of(stage),
        )
        result = run_stage(stage, left.tokens.reshape(batch * fold, count // fold, -1), context)
        states[stage.entry] = dict(result.state)
        return result

    def _fold(self, stage: StagePlan) -> int:
        return self.images if stage.scope == "image" else 1

    def _unfold_index(self, stage: StagePlan, index: Tensor, place: Tensor) -> Tensor:
        """Per-picture candidate indices → indices into all candidates `[b, m·k]`."""
        fold = self._fold(stage)
        batch, count = index.shape
        offset = torch.arange(fold) * (place.shape[1] // fold)
        return (index.clamp(min=0).reshape(batch // fold, fold, count) + offset[None, :, None]).reshape(batch // fold, fold * count)

    # --------------------------------------------------------------------------------------------------- scores
    def _previous_scores(self, turn: _Turn, given: dict[str, Tensor]) -> dict[Need, Tensor]:
        """Attention of the layer before, over all its slots, its columns brought from slots to the turn's tokens."""
        if not self.previous:
            return {}
        layer = self.plan.layer - 1
        key = expand_heads(given[f"key.{layer}"], self.facts.decoder.heads)
        keys = KeySide(key, given["slot_order"], given["slot_valid"], self.windows[layer])
        found = row_scores(self.previous, self._rows(turn, given[f"query.{layer}"]), keys)
        return {need: over_slots.gather(-1, _like(given["slots"], over_slots)) for need, over_slots in found.items()}

    def _next_scores(self, turn: _Turn, given: dict[str, Tensor]) -> dict[Need, Tensor]:
        """Attention of the layer after, its query and keys computed from the tokens at the cut."""
        if not self.next:
            return {}
        layer, hidden = self.plan.layer, turn.hidden
        past_key = given[f"next_key.{layer}"]
        empty = past_key[:, :, :0]
        count = hidden.shape[1]
        no_mask = torch.zeros(hidden.shape[0], 1, count, count, dtype=hidden.dtype)
        state = AttentionState(past={layer: (empty, empty)}, masks={layer: no_mask}, wanted={layer: "all"})
        with recording(state):
            self._parts.attention_only(layer, hidden, self._parts.rotary(hidden, turn.positions))
        key = expand_heads(torch.cat([past_key, state.keys[layer]], 2), self.facts.decoder.heads)
        order, valid = torch.cat([given["next_order"], turn.order], 1), torch.cat([given["next_valid"], turn.valid], 1)
        found = row_scores(self.next, self._rows(turn, state.queries[layer]), KeySide(key, order, valid, self.windows[layer]))
        return {need: over_keys[..., past_key.shape[2] :] for need, over_keys in found.items()}

    def _rows(self, turn: _Turn, query: Tensor) -> QuerySide:
        return QuerySide(query, turn.order, turn.valid, turn.text, turn.last, turn.places, turn.places_valid)


def _like(index: Tensor, scores: Tensor) -> Tensor:
    """Expand `[b, n]` to gather along the last axis of `scores [b, …, s]`."""
    while index.dim() < scores.dim():
        index = index.unsqueeze(1)
    return index.expand(*scores.shape[:-1], index.shape[-1])


def _fold_columns(columns: Tensor, fold: int) -> Tensor:
    """Scores `[b, …, m·v]` → `[b·m, …, v]`."""
    if fold == 1:
        return columns
    shaped = columns.reshape(*columns.shape[:-1], fold, columns.shape[-1] // fold)
    return shaped.movedim(-2, 1).flatten(0, 1)
