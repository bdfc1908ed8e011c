"""Encoder, encoder-site stages, projector (the family's, or the one that replaces it) and projector-site stages as one static module.

Inputs `pixels` `[b, 3, H, W]` (or `[b, patches, values]`), and `text.<n>` `[b, width]` for every text tower that a stage asks; outputs
`tokens [b, v, c]`, then per stage `source.<n>` `[b, k]` (original index among the uncompressed tokens of the picture, class tokens first;
-1 = synthetic), and `state.<entry>.<name>` for a cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tmc_export.core.errors import ExportError
from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Attention, Compressed, Context, Features, Keys, Need, TextTower
from tmc_export.plan.types import StagePlan, TowerPlan, VisionPlan
from tmc_export.surgery._states import StateBook
from tmc_export.surgery.learned import Learned
from tmc_export.surgery.stages import attention_scores, captured_or_raise, gather_rows, move_source, run_stage, text_inputs, texts_by_need

if TYPE_CHECKING:
    from tmc_export.families._contract import VisionParts

__all__ = ["Vision", "VisionTrace"]


class VisionTrace:
    """What moves along while the encoder runs: tokens, their origin, the key bias, captures and states.

    Args:
        tokens: `[b, n, c]`.
        facts: the model's numbers, for the methods.
        learned: the methods' weights.
        texts: what text towers made of the question, by need.
    """

    def __init__(self, tokens: Tensor, facts: ModelFacts, learned: Learned, texts: Mapping[Need, Tensor]) -> None:
        batch, count = tokens.shape[:2]
        self.facts, self.learned, self.texts = facts, learned, texts
        self.tokens = tokens
        self.source = torch.arange(count).expand(batch, count)
        self.valid = torch.ones(batch, count, dtype=torch.bool)
        self.key_bias: Tensor | None = None
        self.captured: dict[Need, Tensor] = {}
        self.features: dict[int, Tensor] = {}
        self.states: dict[int, dict[str, Tensor]] = {}
        self.reports: list[tuple[Tensor, Tensor | None]] = []

    def core(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
        """Attend and remember the operands: all `[b, h, n, d]`; the mask is additive."""
        query = query * scaling
        self._query, self._key, self._mask = query, key, mask
        logits = query @ key.transpose(-1, -2)
        if (bias := self._bias()) is not None:
            logits = logits + bias.to(logits.dtype)
        return logits.softmax(-1) @ value

    def _bias(self) -> Tensor | None:
        """What the layer that ran last added to its scores: mask and key bias, broadcastable to `[b, h, n, n]`."""
        if self.key_bias is None:
            return self._mask
        bias = self.key_bias[:, None, None, :]
        return bias if self._mask is None else self._mask + bias

    def look_ahead(self, parts: VisionParts, needs: tuple[Need, ...], layer: int) -> None:
        """Compute what a stage asked for out of the layer to come (or of the first one that is not in use), and of its attention only."""
        ahead = [n for n in needs if isinstance(n, (Attention, Keys)) and n.layer == "next"]
        if not ahead:
            return
        seen: list[tuple[Tensor, Tensor]] = []

        def watch(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
            seen.append((query * scaling, key))
            return value

        parts.attend(layer, self.tokens, watch)
        query, key = seen[0]
        bias = None if self.key_bias is None else self.key_bias[:, None, None, :]
        for need in ahead:
            if isinstance(need, Keys):
                self.captured[need] = key.transpose(1, 2)
            else:
                self.captured[need] = attention_scores(query[:, :, :1] if need.rows == "cls" else query, key, bias, need)

    def capture(self, needs: tuple[Need, ...], layer: int, place: str) -> None:
        """Compute what a stage asked for out of the layer that ran last."""
        needs = tuple(n for n in needs if n not in self.captured and n not in self.texts)
        if any(isinstance(n, (Keys, Attention)) for n in needs) and self._query.shape[0] != self.tokens.shape[0]:
            raise ExportError(f"encoder layer {layer} attends within windows: it has no keys or scores over all tokens for {place}")
        for need in needs:
            if isinstance(need, Keys):
                self.captured[need] = self._key.transpose(1, 2)
            elif isinstance(need, Features):
                self.captured[need] = self.features[need.layer if need.layer >= 0 else layer]
            elif isinstance(need, Attention) and need.layer == "previous" and need.rows in ("cls", "all"):
                query, bias = self._query, self._bias()
                if need.rows == "cls":
                    query, bias = query[:, :, :1], None if bias is None else bias[:, :, :1]
                self.captured[need] = attention_scores(query, self._key, bias, need)
            else:
                raise ExportError(f"an encoder cannot give {need} at {place}; it has class-token rows, column sums, keys and features")

    def apply(self, plan: StagePlan) -> None:
        """Run a stage on the tokens and move everything along."""
        context = Context(
            layout=plan.before,
            facts=self.facts,
            valid=self.valid,
            source=self.source,
            captured=captured_or_raise({**self.captured, **self.texts}, plan.stage.needs, str(plan.stage.at)),
            state=self.states.get(plan.entry, {}),
            weights=self.learned.of(plan),
        )
        result = run_stage(plan, self.tokens, context)
        self.states[plan.entry] = dict(result.state)
        if result.key_bias is not None:
            self.key_bias = result.key_bias
        elif self.key_bias is not None:
            self.key_bias = gather_rows(self.key_bias, result.source)
        self._take(result)

    def _take(self, result: Compressed) -> None:
        self.source, self.valid, self.tokens = move_source(self.source, result), result.valid, result.tokens
        self.captured.clear()
        self.reports.append((self.source, result.assign))

    def drop(self, count: int) -> None:
        """Drop the first `count` tokens, and what was captured of them: the class tokens, before the projector."""
        if count:
            self.tokens, self.source, self.valid = self.tokens[:, count:], self.source[:, count:], self.valid[:, count:]
            for need, found in self.captured.items():
                self.captured[need] = found[..., count:] if isinstance(need, Attention) else found[:, count:]

    def restart(self, source: Tensor) -> None:
        """Count anew: `source [n]` of the picture's tokens as they now stand, all of them valid."""
        batch, count = self.tokens.shape[:2]
        self.source, self.valid = source.expand(batch, count), torch.ones(batch, count, dtype=torch.bool)


class Vision(nn.Module):
    """One bucket's vision subgraph.

    Args:
        parts: the family's encoder and projector.
        plan: the bucket's numbers and stages.
        dtype: of learned weights.
        leaving: recipe entries whose state a cut reads.
        towers: what stages ask text towers for, in the order of the towers.
    """

    def __init__(
        self,
        parts: VisionParts,
        plan: VisionPlan,
        dtype: torch.dtype = torch.float32,
        leaving: tuple[int, ...] = (),
        towers: Mapping[TextTower, TowerPlan] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.towers = dict(towers)
        self._parts = parts
        self.plan = plan
        self.learned = Learned(plan.stages, dtype)
        self.states = StateBook(leaving)
        for name, module in vars(parts).items():
            if isinstance(module, nn.Module):
                self.add_module(name, module)

    def input_names(self) -> list[str]:
        """Names of the inputs, in the order of `forward`."""
        return ["pixels", *text_inputs(self.towers)]

    def output_names(self) -> list[str]:
        """Names of the outputs, in the order of `forward`; those of states are known once it has run."""
        return ["tokens", *(f"source.{n}" for n in range(len(self.plan.stages))), *self.states.output_names()]

    def _at(self, part: str, layer: int | None, point: str | None = None) -> list[StagePlan]:
        return [s for s in self.plan.stages if (s.stage.at.part, s.stage.at.layer, s.stage.at.point) == (part, layer, point)]

    def forward(self, pixels: Tensor, *texts: Tensor) -> tuple[Tensor, ...]:
        """Encode and compress one bucket of pictures."""
        parts, facts = self._parts, self.plan.facts
        pixels, before = self._inputs(pixels)
        trace = VisionTrace(parts.embed(pixels), facts, self.learned, texts_by_need(self.towers, texts))
        trace.reports += before
        for layer in range(parts.layers):
            for stage in self._at("encoder", layer):
                trace.look_ahead(parts, stage.stage.needs, layer)
                trace.capture(stage.stage.needs, layer - 1, str(stage.stage.at))
                trace.apply(stage)
            trace.tokens = parts.attend(layer, trace.tokens, trace.core)
            for stage in self._at("encoder", layer, "mid"):
                trace.capture(stage.stage.needs, layer - 1, str(stage.stage.at))
                trace.apply(stage)
            trace.tokens = parts.feed_forward(layer, trace.tokens)
            trace.features[layer] = trace.tokens
        for stage in self._at("encoder", None):
            trace.look_ahead(parts, stage.stage.needs, parts.layers)
            trace.capture(stage.stage.needs, parts.layers - 1, str(stage.stage.at))
            trace.apply(stage)
        replacing = self.plan.replacing
        if replacing is not None:
            trace.capture(replacing.stage.needs, parts.layers - 1, str(replacing.stage.at))
        trace.tokens = parts.finish(trace.tokens)
        encoder = [s for s in self.plan.stages if s.stage.at.part == "encoder"]
        trace.drop(encoder[-1].after.class_tokens if encoder else facts.encoder.class_tokens)
        self._project(trace)
        for stage in self._at("projector", None):
            trace.capture(stage.stage.needs, parts.layers - 1, str(stage.stage.at))
            trace.apply(stage)
        handed = self.states.hand_on(trace.states, dict.fromkeys(self.states.entries, pixels.shape[0]))
        return (trace.tokens, *[source for source, _ in trace.reports], *handed)

    def _project(self, trace: VisionTrace) -> None:
        """Run the family's projector, or the stage that replaces it on the encoder's tokens in raster order."""
        merge, replacing = self.plan.facts.encoder.merge, self.plan.replacing
        if replacing is None:
            trace.tokens = self._parts.project(trace.tokens)
            if merge > 1:
                trace.restart(torch.arange(trace.tokens.shape[1]))
            return
        if merge > 1:
            trace.tokens = self._parts.in_raster(trace.tokens)
            trace.restart(_joined_place(self.plan.grid, merge))
        trace.apply(replacing)

    def _inputs(self, pixels: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        """Run `input` stages on the raster of pixels `[b, 3, H, W]`."""
        reports: list[tuple[Tensor, Tensor | None]] = []
        stages = self._at("input", None)
        if not stages:
            return pixels, reports
        pixels = self._parts.raster(pixels)
        batch, channels, count = pixels.shape[0], pixels.shape[1], pixels.shape[2] * pixels.shape[3]
        source, valid = torch.arange(count).expand(batch, count), torch.ones(batch, count, dtype=torch.bool)
        for stage in stages:
            context = Context(layout=stage.before, facts=self.plan.facts, valid=valid, source=source, weights=self.learned.of(stage))
            result = run_stage(stage, pixels.flatten(2).transpose(1, 2), context)
            rows, columns = stage.after.grid or (0, 0)
            pixels = result.tokens.transpose(1, 2).reshape(batch, channels, rows, columns)
            source, valid = move_source(source, result), result.valid
            reports.append((source, None))
        return pixels, reports


def _joined_place(grid: tuple[int, int], merge: int) -> Tensor:
    """The place of each patch of a raster among the tokens that the family's projector would join: `[rows · columns]`."""
    rows, columns = torch.arange(grid[0]) // merge, torch.arange(grid[1]) // merge
    return (rows[:, None] * (grid[1] // merge) + columns[None]).flatten()
