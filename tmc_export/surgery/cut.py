"""The compress subgraph between two blocks: scores on the side, the method, and the sequence put together again.

Inputs, in order: `hidden [b, S, c]`, `positions [r, b, S]`, `order [b, S]`, `valid [b, S]`, `group [b, S]` (0 text, else picture 1…m),
`candidates [b, m·v]` (places of the visual tokens in S), `candidate_valid [b, m·v]`, `last [b]`; for attention of the layer before:
`slots [b, S]` (KV slot of each token), `slot_order`, `slot_valid` `[b, C]`, `query.<l>` and `key.<l>` `[b, g, C, d]`; for attention of the
layer after: `next_order`, `next_valid` `[b, C']` and `key.<l>` `[b, g, C', d]` (what earlier turns left in the next block).
Outputs: `hidden_out [b, S', c]`, `source` and `place` `[b, S']` (which token of S a token has its rotary position, and its place in the
conversation, from; see `sequence`), `valid_out [b, S']`, then per stage `kept.<n>` `[b, m·k]` (index among the arriving candidates, -2
synthetic, -1 none; a stage that leaves no token has no such output) and `kv.<l>` `[b, S]` where the method prunes KV of an earlier layer.
The KV of the whole turn is in the slots when this graph runs, so that the scores do not depend on bucket, chunking or context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tmc_export.core.errors import ExportError
from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Attention, Compressed, Context, Need, TextEmbeds
from tmc_export.plan.types import CutPlan, StagePlan
from tmc_export.surgery.attention import AttentionState, additive_mask, expand_heads, recording
from tmc_export.surgery.learned import Learned
from tmc_export.surgery.sequence import Candidates, arriving, assemble, leave, members
from tmc_export.surgery.stages import attention_scores, captured_or_raise, run_stage

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


class Cut(nn.Module):
    """All stages between two blocks.

    Args:
        parts: the family's decoder.
        plan: the cut.
        images: pictures in the bucket.
        facts: the model's numbers.
        windows: per decoder layer, its sliding window or None.
        dtype: of learned weights.
    """

    def __init__(
        self,
        parts: DecoderParts,
        plan: CutPlan,
        images: int,
        facts: ModelFacts,
        windows: tuple[int | None, ...],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.learned = Learned(plan.stages, dtype)
        self._parts, self.plan, self.images, self.facts, self.windows = parts, plan, images, facts, windows
        self.previous, self.next = plan.attention("previous"), plan.attention("next")
        self.scored_layer = parts.layers[plan.layer] if self.next else None

    def input_names(self) -> list[str]:
        """Names of the inputs, in the order of `forward`."""
        names = ["hidden", "positions", "order", "valid", "group", "candidates", "candidate_valid", "last"]
        if self.previous:
            layer = self.plan.layer - 1
            names += ["slots", "slot_order", "slot_valid", f"query.{layer}", f"key.{layer}"]
        if self.next:
            names += ["next_order", "next_valid", f"next_key.{self.plan.layer}"]
        return names

    def output_names(self) -> list[str]:
        """Names of the outputs, in the order of `forward`."""
        kept = [f"kept.{n}" for n, stage in enumerate(self.plan.stages) if stage.after.tokens]
        names = ["hidden_out", "source", "place", "valid_out", *kept]
        return names + [f"kv.{layer}" for layer in sorted({i for s in self.plan.stages for i in s.after.kv_rows})]

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
        turn = _Turn(hidden, positions, order, valid, last, valid & (group == 0))
        scores = self._previous_scores(turn, side)
        scores |= self._next_scores(turn, side)
        left: Candidates | None = arriving(hidden, candidates, candidate_valid)
        states: dict[int, dict[str, Tensor]] = {}
        kept: list[Tensor] = []
        kv: dict[int, Tensor] = {}
        for stage in self.plan.stages:
            if left is None or stage.after.tokens == 0:  # nothing to compute: only the text goes on
                left = None
                continue
            result = self._run(stage, turn, left, scores, states)
            if result.text is not None:
                hidden = torch.where(turn.text[:, :, None], result.text.to(hidden.dtype), hidden)
            for layer, rows in result.kv.items():
                chosen = self._unfold_index(stage, rows, left.place)
                listed = (left.alive & (left.index >= 0)).gather(1, chosen) & (rows >= 0).reshape(chosen.shape)
                kv[layer] = members(left.origin.gather(1, chosen), listed, hidden.shape[1])
            left = leave(left, result, self._fold(stage))
            kept.append(left.report())
        return (*assemble(hidden, turn.text, left, self.plan.tokens_out), *kept, *[kv[layer] | turn.text for layer in sorted(kv)])

    # ------------------------------------------------------------------------------------------------- one stage
    def _run(
        self, stage: StagePlan, turn: _Turn, left: Candidates, scores: dict[Need, Tensor], states: dict[int, dict[str, Tensor]]
    ) -> Compressed:
        """Run a stage on every picture by itself, or on all of them (`joint`); `states` gets what it hands on."""
        fold = self._fold(stage)
        batch, count = left.place.shape
        axes = turn.positions.shape[0]
        at_place = turn.positions.gather(2, left.origin[None].expand(axes, -1, -1)).reshape(axes, batch * fold, count // fold)
        captured = {n: _fold_columns(s.gather(-1, _like(left.origin, s)), fold) for n, s in scores.items()}
        wants_text = any(isinstance(n, TextEmbeds) for n in stage.stage.needs)
        context = Context(
            layout=stage.before,
            facts=self.facts,
            valid=left.alive.reshape(batch * fold, -1),
            source=torch.arange(count // fold).expand(batch * fold, count // fold),
            positions=at_place,
            text=turn.hidden.repeat_interleave(fold, 0) if wants_text else None,
            text_valid=turn.text.repeat_interleave(fold, 0) if wants_text else None,
            captured=captured_or_raise(captured, tuple(n for n in stage.stage.needs if isinstance(n, Attention)), str(stage.stage.at)),
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
    def _previous_scores(self, turn: _Turn, side: tuple[Tensor, ...]) -> dict[Need, Tensor]:
        """Attention of the layer before, over all its slots, its columns brought from slots to the turn's tokens."""
        if not self.previous:
            return {}
        slots, slot_order, slot_valid, query, key = side[:5]
        keys = expand_heads(key, self.facts.decoder.heads)
        window = self.windows[self.plan.layer - 1]
        found: dict[Need, Tensor] = {}
        for need in self.previous:
            rows, row_order, row_valid = self._rows(need, query, turn)
            mask = additive_mask(row_order, slot_order, slot_valid, window, torch.float32)
            over_slots = attention_scores(rows, keys, mask, need, row_valid)
            found[need] = over_slots.gather(-1, _like(slots, over_slots))
        return found

    def _next_scores(self, turn: _Turn, side: tuple[Tensor, ...]) -> dict[Need, Tensor]:
        """Attention of the layer after, its query and keys computed from the tokens at the cut."""
        if not self.next:
            return {}
        past_order, past_valid, past_key = side[-3:]
        layer, hidden = self.plan.layer, turn.hidden
        empty = past_key[:, :, :0]
        count = hidden.shape[1]
        no_mask = torch.zeros(hidden.shape[0], 1, count, count, dtype=hidden.dtype)
        state = AttentionState(past={layer: (empty, empty)}, masks={layer: no_mask}, wanted={layer: "all"})
        with recording(state):
            self._parts.attention_only(layer, hidden, self._parts.rotary(hidden, turn.positions))
        keys = expand_heads(torch.cat([past_key, state.keys[layer]], 2), self.facts.decoder.heads)
        key_order, key_valid = torch.cat([past_order, turn.order], 1), torch.cat([past_valid, turn.valid], 1)
        found: dict[Need, Tensor] = {}
        for need in self.next:
            rows, row_order, row_valid = self._rows(need, state.queries[layer], turn)
            mask = additive_mask(row_order, key_order, key_valid, self.windows[layer], torch.float32)
            found[need] = attention_scores(rows, keys, mask, need, row_valid)[..., past_key.shape[2] :]
        return found

    def _rows(self, need: Attention, query: Tensor, turn: _Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Pick the query rows of a need: `[b, h, R, d]`, their order `[b, R]` and validity."""
        last = turn.last
        if need.rows == "last":
            if query.shape[2] > 1:
                query = query.gather(2, last[:, None, None, None].expand(-1, query.shape[1], 1, query.shape[3]))
            return query, turn.order.gather(1, last[:, None]), torch.ones_like(last[:, None], dtype=torch.bool)
        if need.rows == "all":
            return query, turn.order, turn.valid
        raise ExportError(f"attention rows '{need.rows}' are not captured at a decoder cut; 'last' and 'all' are")


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
