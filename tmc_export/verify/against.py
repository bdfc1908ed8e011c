"""The reference against its surroundings: Hugging Face's `generate`, what was recorded, and half precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmc_export.bundle.program import SlotCodes
from tmc_export.plan.types import Plan, VisionPlan
from tmc_export.runtime._chat import expand_image_tokens
from tmc_export.verify.compare import Check, compare_indices, compare_logits, compare_tensor
from tmc_export.verify.half import RangeRecorder
from tmc_export.verify.recorded import Case, CaseTurn
from tmc_export.verify.reference import Reference, ReferenceTurn
from tmc_export.verify.tolerances import FLOAT16_MAX, Tolerance, margin_bound, tolerance

__all__ = ["compare_half", "compare_with_generate", "compare_with_plain_slots", "compare_with_recorded", "uncompressed"]


def uncompressed(plan: Plan) -> Plan:
    """Return the plan of the same model and inputs without any stage."""

    def whole(vision: VisionPlan) -> VisionPlan:
        encoder = vision.facts.encoder
        grid = (vision.size[0] // encoder.patch, vision.size[1] // encoder.patch)
        out = (grid[0] // encoder.merge, grid[1] // encoder.merge)
        facts = replace(vision.facts, encoder=replace(encoder, grid=grid), visual_grid=out)
        return replace(vision, grid=grid, facts=facts, stages=(), tokens=facts.visual_tokens, out_grid=out, barrier=0)

    return replace(plan, vision=tuple(whole(v) for v in plan.vision), cuts=(), towers=())


def compare_with_generate(model: Path, plan: Plan, cases: Sequence[Case], table: Tolerance) -> Iterator[Check]:
    """Compare the reference without stages with `generate()`: greedy tokens, and logits at every step, of every first turn.

    Args:
        model: the checkpoint.
        plan: its stages are left out.
        cases: their inputs are used, not their answers.
        table: tolerance.
    """
    reference = Reference(model, uncompressed(plan))
    for case in cases:
        turn = case.turns[0]
        steps = len(turn.expected.tokens)
        ids, group = expand_image_tokens(turn.ids, plan.facts.image_token, reference.visual_tokens(turn.pixels, turn.buckets))
        tokens, logits = _generate(reference, turn, ids, torch.from_numpy(group), steps)
        reference.reset()
        found = reference.turn(turn.pixels, ids, group.astype(np.int64), forced=tokens, buckets=turn.buckets, text=turn.text)
        yield compare_logits(f"{case.name}/logits", found.logits, logits, table)


def _generate(reference: Reference, turn: CaseTurn, ids: Any, group: torch.Tensor, steps: int) -> tuple[list[int], Any]:
    """Greedy `generate()` past end tokens, so that every step can be compared: tokens and `[steps, vocabulary]`."""
    given = torch.from_numpy(ids)[None]
    model, plans = reference.model, reference.buckets(turn.pixels, turn.buckets)
    pictures = model.tower.generate_inputs([torch.from_numpy(p) for p in turn.pixels], plans, group) if plans else {}
    out = model.whole.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **pictures,
    )
    return [int(t) for t in out.sequences[0, given.shape[1] :]], torch.cat(out.logits).float().numpy()


def compare_with_recorded(
    model: Path, plan: Plan, cases: Sequence[Case], table: Tolerance, codes: SlotCodes | None = None
) -> Iterator[Check]:
    """Answer the recorded conversations again, along the recorded answers, and compare visual tokens, kept indices and logits.

    Args:
        model: the checkpoint.
        plan: the bundle's plan.
        cases: what the bundle recorded.
        table: tolerance.
        codes: how the bundle keeps keys and values.
    """
    reference = Reference(model, plan, codes=codes)
    for case in cases:
        reference.reset()
        for number, turn in enumerate(case.turns, start=1):
            ids, group = expand_image_tokens(turn.ids, plan.facts.image_token, reference.visual_tokens(turn.pixels, turn.buckets))
            found = reference.turn(
                turn.pixels, ids, group.astype(np.int64), forced=turn.expected.tokens, buckets=turn.buckets, text=turn.text
            )
            checks = list(_same_turn(f"{case.name}/turn {number}", found, turn.expected, table))
            yield from checks
            if any(c.exceptions for c in checks):
                break


def compare_with_plain_slots(model: Path, plan: Plan, cases: Sequence[Case], table: Tolerance) -> Iterator[Check]:
    """Compare the answers of a cache of codes with those of one that keeps keys and values as they are: what the codes cost.

    Behind a cut that keeps other tokens for rounded keys, nothing is compared.

    Args:
        model: the checkpoint.
        plan: the bundle's plan.
        cases: answered by a reference with codes.
        table: tolerance.
    """
    reference = Reference(model, plan)
    for case in cases:
        reference.reset()
        for number, turn in enumerate(case.turns, start=1):
            ids, group = expand_image_tokens(turn.ids, plan.facts.image_token, reference.visual_tokens(turn.pixels, turn.buckets))
            forced = turn.expected.tokens
            plain = reference.turn(turn.pixels, ids, group.astype(np.int64), forced=forced, buckets=turn.buckets, text=turn.text)
            name = f"{case.name}/turn {number}/logits beside plain slots"
            if [s.kept.tolist() for s in plain.stages] != [s.kept.tolist() for s in turn.expected.stages]:
                yield Check(name, None, True, "left out: rounded keys keep other tokens")
                break
            yield compare_logits(name, turn.expected.logits, plain.logits, table)


def _same_turn(name: str, got: ReferenceTurn, want: ReferenceTurn, table: Tolerance) -> Iterator[Check]:
    if len(got.stages) != len(want.stages):
        yield Check(name, None, False, f"{len(got.stages)} stages ran, {len(want.stages)} were recorded")
        return
    ties = False
    for mine, theirs in zip(got.stages, want.stages, strict=True):
        tied = theirs.excuses(mine.kept, margin_bound("float32"))
        check = compare_indices(f"{name}/{theirs.method} at {theirs.at}", mine.kept, theirs.kept, tied=tied, margin=theirs.margin)
        ties = ties or bool(check.exceptions)
        yield check
    if ties:
        return
    for picture, tokens in enumerate(want.vision):
        yield compare_tensor(f"{name}/picture {picture + 1}/tokens", got.vision[picture], tokens, table)
    yield compare_logits(f"{name}/logits", got.logits, want.logits, table)


def compare_half(model: Path, plan: Plan, case: Case, *, judged: bool, codes: SlotCodes | None = None) -> tuple[list[Check], str]:
    """Answer a turn in torch's half precision, record the largest magnitude of every operator, and compare with float32.

    Args:
        model: the checkpoint.
        plan: the bundle's plan.
        case: its first turn is used.
        judged: an overflow is a failure; without it (activations stay in float32) it is only said.
        codes: how the bundle keeps keys and values.

    Returns:
        The checks, and a line for the report.
    """
    turn = case.turns[0]
    reference = Reference(model, plan, codes=codes)
    ids, group = expand_image_tokens(turn.ids, plan.facts.image_token, reference.visual_tokens(turn.pixels, turn.buckets))
    exact = reference.turn(turn.pixels, ids, group.astype(np.int64), forced=turn.expected.tokens, buckets=turn.buckets, text=turn.text)
    lower = Reference(model, plan, dtype="float16", codes=codes)
    modules = {name: module for name, module in lower.model.whole.named_modules() if name}
    with RangeRecorder(modules) as recorder:
        half = lower.turn(turn.pixels, ids, group.astype(np.int64), forced=turn.expected.tokens, buckets=turn.buckets, text=turn.text)
    ranges = recorder.ranges()
    largest = ranges[0]
    over, near = [r for r in ranges if r.overflows], [r for r in ranges if r.near]
    note = f"largest |x| {largest.largest:.4g} ({largest.place}), float16 holds {FLOAT16_MAX:g}"
    if near and not over:
        note += f"; warning: {len(near)} operators come above half of that"
    checks = [
        Check("overflow", None, not (over and judged), f"{len(over)} operators exceed float16, first {over[0].place}" if over else "")
    ]
    fp8 = codes is not None and codes.dtype == "fp8"  # what int8 codes turn stays within float16's bound
    table = tolerance("end_to_end", "fp8 slots, half" if fp8 else "float16")
    same = [s.kept.tolist() for s in half.stages] == [s.kept.tolist() for s in exact.stages]
    checks.append(compare_logits(f"{case.name}/logits in torch half", half.logits, exact.logits, table))
    if not judged and not checks[-1].passed:
        checks[-1] = replace(checks[-1], passed=True, note=f"this bundle computes in float32; in float16: {checks[-1].note}")
    return checks, note + ("" if same else "; half precision keeps other tokens")
