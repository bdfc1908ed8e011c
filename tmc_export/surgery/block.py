"""A run of decoder layers as one module, symbolic in T (new tokens) and P (past slots).

Inputs, in order: `hidden [b, T, c]`, `positions [r, b, T]`, `order [b, T]`, `valid [b, T]`, `past_order [b, P]`, `past_valid [b, P]`,
`since [b, T]` (first place that a token sees; only where a picture has a barrier), `text [b, T]` (which are text; only where rows are added
up), `last [b]` (only where a row is picked), then `past_key_values.<l>.key` and `.value` `[b, g, P, d]` per layer.
Outputs: `hidden_out [b, T, c]` or `logits [b, vocabulary]`, `query.<l>` and `sums.<l>.<n> [b, P+T]` where a cut needs them, then
`present.<l>.key` and `.value` `[b, g, T, d]`. The static decode graph returns its slots `[b, g, C, d]` instead, the new row written
(`passes.append_in_place`), takes no `last`, because its token is the only one (`passes.pick_only_row`), and adds nothing up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tmc_export.plan.types import BlockPlan
from tmc_export.surgery._sums import members_of, sum_name
from tmc_export.surgery.attention import AttentionState, additive_mask, recording

if TYPE_CHECKING:
    from tmc_export.families._contract import DecoderParts

__all__ = ["DecoderBlock"]


class DecoderBlock(nn.Module):
    """Layers `[first, last)` of a decoder, and the norm and head if the plan says so.

    Args:
        parts: the family's decoder.
        plan: the block.
        windows: per decoder layer, its sliding window or None.
    """

    def __init__(self, parts: DecoderParts, plan: BlockPlan, windows: tuple[int | None, ...]) -> None:
        super().__init__()
        self._parts = parts
        self.plan = plan
        self.windows = windows
        self.layers = nn.ModuleList(list(parts.layers)[plan.first : plan.last])
        self.norm = parts.norm if plan.head else None
        self.head = parts.head if plan.head else None

    @property
    def needs_last(self) -> bool:
        """Whether the block picks the row of the last valid token."""
        return self.plan.head or "last" in self.plan.query_rows.values()

    def input_names(self) -> list[str]:
        """Names of the inputs, in the order of `forward`."""
        names = ["hidden", "positions", "order", "valid", "past_order", "past_valid"]
        names += (["since"] if self.plan.since else []) + (["text"] if self.plan.row_sums else [])
        names += ["last"] if self.needs_last else []
        return names + [f"past_key_values.{i}.{kind}" for i in range(self.plan.first, self.plan.last) for kind in ("key", "value")]

    def output_names(self) -> list[str]:
        """Names of the outputs, in the order of `forward`."""
        names = ["logits" if self.plan.head else "hidden_out"] + [f"query.{i}" for i in sorted(self.plan.query_rows)]
        names += [sum_name(i, n) for i, needs in sorted(self.plan.row_sums.items()) for n in range(len(needs))]
        return names + [f"present.{i}.{kind}" for i in range(self.plan.first, self.plan.last) for kind in ("key", "value")]

    def forward(
        self, hidden: Tensor, positions: Tensor, order: Tensor, valid: Tensor, past_order: Tensor, past_valid: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the layers; shapes as in the module's description."""
        since, rest = (rest[0], rest[1:]) if self.plan.since else (None, rest)
        text, rest = (rest[0], rest[1:]) if self.plan.row_sums else (None, rest)
        last, past = (rest[0], rest[1:]) if self.needs_last else (None, rest)
        layers = range(self.plan.first, self.plan.last)
        key_order, key_valid = torch.cat([past_order, order], 1), torch.cat([past_valid, valid], 1)
        windows = {self.windows[i] for i in layers}
        by_window = {w: additive_mask(order, key_order, key_valid, w, hidden.dtype, since) for w in windows}
        state = AttentionState(
            past={i: (past[2 * n], past[2 * n + 1]) for n, i in enumerate(layers)},
            masks={i: by_window[self.windows[i]] for i in layers},
            wanted=self.plan.query_rows,
            last=last,
            summed=self.plan.row_sums,
            member={} if text is None else members_of(valid, text & valid),
        )
        with recording(state):
            rotary = self._parts.rotary(hidden, positions)
            for i in layers:
                hidden = self._parts.run(i, hidden, rotary)
        if self.norm is not None and self.head is not None and last is not None:
            row = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
            hidden = self.head(self.norm(row))  # on [b, c] it traces to Gemm, which reads the tied table as it is stored
        new = [t for i in layers for t in (state.keys[i], state.values[i])]
        sums = [state.sums[i][need] for i, needs in sorted(self.plan.row_sums.items()) for need in needs]
        return (hidden, *[state.queries[i] for i in sorted(self.plan.query_rows)], *sums, *new)
