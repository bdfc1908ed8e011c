"""Playing recorded conversations through a bundle's runtime, along the recorded answers, and comparing every step. No torch.

Legend: n tokens of the turn, v visual tokens of a picture, m pictures of the bucket, k kept, t steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import CutProgram
from tmc_export.runtime._decoder import Route, TurnTrace
from tmc_export.runtime.session import Prompt, Session
from tmc_export.verify._trace import StageTrace
from tmc_export.verify.compare import Check, compare_indices, compare_logits, compare_tensor
from tmc_export.verify.recorded import Case, CaseTurn
from tmc_export.verify.tolerances import Tolerance, margin_bound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["by_cut", "expected_places", "is_tie", "live_places", "play"]


def play(session: Session, cases: Iterable[Case], tolerance: Tolerance, precision: str, route: Route = "auto") -> tuple[Check, ...]:
    """Play conversations and compare visual tokens, kept indices, and logits at every step.

    Once a kept set differs within the tie margin, everything after it in that conversation rests on another choice: those comparisons are
    left out and said to be.

    Args:
        session: the bundle; its conversation is lost.
        cases: what the reference answered.
        tolerance: for tensors.
        precision: row of the margin table.
        route: see `Decoder.turn`; `chunked` proves that chunking changes nothing.
    """
    checks: list[Check] = []
    for case in cases:
        session.reset()
        ids: list[int] = []
        pixels: list[tuple[int, Array]] = []
        questions: list[str] = []
        for number, turn in enumerate(case.turns):
            if session.program.turns == "recompute":
                session.decoder.reset()
            else:
                ids, pixels, questions = [], [], []
            ids += turn.ids
            pixels += [(b, p[None].astype(session.program.dtype)) for b, p in zip(turn.buckets, turn.pixels, strict=True)]
            questions += [turn.text] * len(turn.pixels)
            name = f"{case.name}/turn {number + 1}"
            try:
                found = list(_play_turn(session, name, session.prompt(ids, pixels, questions), turn, tolerance, precision, route))
            except KeyError as error:
                found = [Check(name, None, False, f"the output {error} is missing")]
            checks += found
            ids += turn.expected.tokens[:-1]
            if any(c.exceptions for c in found):
                break
    return tuple(checks)


def _play_turn(
    session: Session, name: str, laid: Prompt, turn: CaseTurn, tolerance: Tolerance, precision: str, route: Route
) -> Iterable[Check]:
    want, program = turn.expected, session.program
    earlier = len(laid.pixels) - len(turn.pixels)  # pictures of the turns before, where turns are recomputed
    for picture, tokens_wanted in enumerate(want.vision):
        file = program.vision[turn.buckets[picture]].file
        kept = list(_sources(name, laid.sources[earlier + picture], picture, want.stages, precision, file))
        yield from kept
        if any(c.exceptions for c in kept):
            yield Check(f"{name}/picture {picture + 1}/tokens", file, True, "left out: another choice, within the tie margin")
            return
        yield compare_tensor(f"{name}/picture {picture + 1}/tokens", laid.tokens[earlier + picture], tokens_wanted, tolerance, file)
    trace = session.run_prompt(laid, route)
    kept = [c for cut in program.cuts for c in _kept(name, cut, trace, want.stages, program.images, precision)]
    yield from kept
    if any(c.exceptions for c in kept):
        yield Check(f"{name}/logits", None, True, "left out: another token was kept, within the tie margin")
        return
    logits = [trace.logits, *(session.decoder.step(token) for token in want.tokens[:-1])]
    yield compare_logits(f"{name}/logits", np.stack(logits), want.logits, tolerance)
    rows = tuple(s.used for s in session.decoder.slots for _ in range(s.block.first, s.block.last))
    fine = rows == want.cache_rows
    yield Check(f"{name}/KV rows", None, fine, "" if fine else f"{rows} rows are filled, the reference holds {want.cache_rows}")


def _sources(name: str, got: Sequence[Array], picture: int, stages: Sequence[StageTrace], precision: str, file: str) -> Iterable[Check]:
    """Compare the original indices that leave each stage of the vision graph."""
    wanted = [s for s in stages if s.picture == picture + 1 and not s.at.startswith("decoder")]
    for number, stage in enumerate(wanted):
        found = np.asarray(got[number], np.int64) if number < len(got) else None
        label = f"{name}/picture {picture + 1}/{stage.method} at {stage.at}"
        tied = found is not None and stage.excuses_source(found, margin_bound(precision))
        yield compare_indices(label, found, stage.source, tied=tied, margin=stage.margin, subgraph=file)


def by_cut(stages: Sequence[StageTrace], layer: int) -> list[list[StageTrace]]:
    """Group the traces of the cut at a decoder layer by stage; within a stage, one per picture."""
    found: dict[tuple[int, int], list[StageTrace]] = {}
    for stage in stages:
        if stage.at == f"decoder.{layer}":
            found.setdefault((stage.entry, stage.index), []).append(stage)
    return list(found.values())


def expected_places(traces: Sequence[StageTrace], cut: CutProgram, images: int) -> Array:
    """Return the live places `[≤ m·k]` among the bucket's `m·v` candidates: picture p's begin at p·v; a synthetic token has -1."""
    each = cut.visual_in // max(images, 1)
    return np.concatenate([np.where(t.kept < 0, -1, t.kept + max(t.picture - 1, 0) * each) for t in traces])


def live_places(got: Array | None) -> Array | None:
    """Return the rows of a `kept.<n>` that hold a token, as `expected_places` has them."""
    return None if got is None else np.maximum(got[got != -1], -1)


def is_tie(traces: Sequence[StageTrace], got: Array | None, cut: CutProgram, images: int, bound: float) -> bool:
    """Return whether every picture's other choice is excused; one picture's tie excuses no other picture.

    Args:
        traces: one stage of a cut, one trace per picture, or a single one for all of them.
        got: live places `[≤ m·k]` among the bucket's candidates; synthetic tokens (-1) are no choice.
        cut: the cut.
        images: m.
        bound: of the k-th margin.
    """
    each = cut.visual_in // max(images, 1)
    if got is None:
        return False
    for trace in traces:
        first = (trace.picture - 1) * each
        mine = got[(got >= first) & (got < first + each)] - first if trace.picture else got[got >= 0]
        if not replace(trace, kept=trace.kept[trace.kept >= 0]).excuses(mine, bound):
            return False
    return True


def _kept(name: str, cut: CutProgram, trace: TurnTrace, stages: Sequence[StageTrace], images: int, precision: str) -> Iterable[Check]:
    """Compare what a cut kept, stage by stage."""
    for number, traces in enumerate(by_cut(stages, cut.layer)):
        got = trace.kept.get((cut.before_block, number))
        live = live_places(got)
        tied = is_tie(traces, live, cut, images, margin_bound(precision))
        margins = [t.margin for t in traces if t.margin is not None]
        label = f"{name}/{traces[0].method} at {traces[0].at}"
        margin = min(margins, default=None)
        yield compare_indices(label, live, expected_places(traces, cut, images), tied=tied, margin=margin, subgraph=cut.file)
