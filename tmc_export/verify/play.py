"""Playing recorded conversations through a bundle's runtime, along the recorded answers, and comparing every step. No torch.

Legend: n tokens of the turn, v visual tokens of a picture, m pictures of the bucket, k kept, t steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tmc_export.bundle.program import CutProgram, Program
from tmc_export.runtime._decoder import Route
from tmc_export.runtime.session import Session
from tmc_export.verify._trace import StageTrace
from tmc_export.verify.compare import Check, compare_indices, compare_logits, compare_tensor
from tmc_export.verify.recorded import Case, CaseTurn
from tmc_export.verify.tolerances import Tolerance, margin_bound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Player", "TurnOutputs", "by_cut", "expected_places", "is_tie", "judge_turn", "live_places", "play"]

TurnOutputs: TypeAlias = Mapping[str, "Array"]
"""What a turn gave: `logits` float `[t, vocabulary]`, `tokens` int64 `[t]` (the likeliest at each step), `rows` int64 `[layers]` (KV rows
filled), per picture of the turn `picture.<p>.tokens` `[v, c]` and `picture.<p>.source.<n>` int64 `[k]`, and per stage of a cut
`kept.<block>.<n>` int64 `[m·k]`, as `TurnTrace.kept` has them."""


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
        player = Player(session, route)
        for number, turn in enumerate(case.turns, start=1):
            name = f"{case.name}/turn {number}"
            try:
                found = list(judge_turn(name, player.turn(turn), turn, session.program, tolerance, precision))
            except KeyError as error:
                found = [Check(name, None, False, f"the output {error} is missing")]
            checks += found
            if any(c.exceptions for c in found):
                break
    return tuple(checks)


class Player:
    """Plays one recorded conversation through a session, turn by turn, along the recorded answers.

    Args:
        session: the bundle; its conversation is lost.
        route: see `Decoder.turn`.
    """

    def __init__(self, session: Session, route: Route = "auto") -> None:
        self._session, self._route = session, route
        self._ids: list[int] = []
        self._pixels: list[tuple[int, Array]] = []
        self._questions: list[str] = []
        session.reset()

    def turn(self, turn: CaseTurn) -> TurnOutputs:
        """Play the next turn; what comes out is named as `TurnOutputs` says.

        Raises:
            KeyError: a graph lacks an output.
        """
        session = self._session
        if session.program.turns == "recompute":
            session.decoder.reset()
        else:
            self._ids, self._pixels, self._questions = [], [], []
        self._ids += turn.ids
        self._pixels += [(b, p[None].astype(session.program.dtype)) for b, p in zip(turn.buckets, turn.pixels, strict=True)]
        self._questions += [turn.text] * len(turn.pixels)
        try:
            laid = session.prompt(self._ids, self._pixels, self._questions)
            trace = session.run_prompt(laid, self._route)
            logits = np.stack([trace.logits, *(session.decoder.step(token) for token in turn.expected.tokens[:-1])])
        finally:
            self._ids += turn.expected.tokens[:-1]
        rows = [s.used for s in session.decoder.slots for _ in range(s.block.first, s.block.last)]
        found = {"logits": logits, "tokens": logits.argmax(-1).astype(np.int64), "rows": np.array(rows, np.int64)}
        earlier = len(laid.pixels) - len(turn.pixels)  # pictures of the turns before, where turns are recomputed
        for picture in range(len(turn.pixels)):
            found[f"picture.{picture}.tokens"] = laid.tokens[earlier + picture]
            sources = laid.sources[earlier + picture]
            found |= {f"picture.{picture}.source.{n}": np.asarray(s, np.int64) for n, s in enumerate(sources)}
        return found | {f"kept.{block}.{stage}": places for (block, stage), places in trace.kept.items()}


def judge_turn(name: str, got: TurnOutputs, turn: CaseTurn, program: Program, tolerance: Tolerance, precision: str) -> Iterable[Check]:
    """Compare what a turn gave with what the reference answered; see `play`."""
    want = turn.expected
    for picture, tokens_wanted in enumerate(want.vision):
        file = program.vision[turn.buckets[picture]].file
        kept = list(_sources(name, got, picture, want.stages, precision, file))
        yield from kept
        if any(c.exceptions for c in kept):
            yield Check(f"{name}/picture {picture + 1}/tokens", file, True, "left out: another choice, within the tie margin")
            return
        yield compare_tensor(f"{name}/picture {picture + 1}/tokens", got.get(f"picture.{picture}.tokens"), tokens_wanted, tolerance, file)
    kept = [c for cut in program.cuts for c in _kept(name, cut, got, want.stages, program.images, precision)]
    yield from kept
    if any(c.exceptions for c in kept):
        yield Check(f"{name}/logits", None, True, "left out: another token was kept, within the tie margin")
        return
    yield compare_logits(f"{name}/logits", got.get("logits"), want.logits, tolerance)
    rows = got.get("rows")
    filled = None if rows is None else tuple(int(r) for r in rows)
    fine = filled == want.cache_rows
    note = "the output is missing" if filled is None else f"{filled} rows are filled, the reference holds {want.cache_rows}"
    yield Check(f"{name}/KV rows", None, fine, "" if fine else note)


def _sources(name: str, got: TurnOutputs, picture: int, stages: Sequence[StageTrace], precision: str, file: str) -> Iterable[Check]:
    """Compare the original indices that leave each stage of the vision graph."""
    wanted = [s for s in stages if s.picture == picture + 1 and not s.at.startswith("decoder")]
    for number, stage in enumerate(wanted):
        found = got.get(f"picture.{picture}.source.{number}")
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


def _kept(name: str, cut: CutProgram, got: TurnOutputs, stages: Sequence[StageTrace], images: int, precision: str) -> Iterable[Check]:
    """Compare what a cut kept, stage by stage."""
    for number, traces in enumerate(by_cut(stages, cut.layer)):
        live = live_places(got.get(f"kept.{cut.before_block}.{number}"))
        tied = is_tie(traces, live, cut, images, margin_bound(precision))
        margins = [t.margin for t in traces if t.margin is not None]
        label = f"{name}/{traces[0].method} at {traces[0].at}"
        margin = min(margins, default=None)
        yield compare_indices(label, live, expected_places(traces, cut, images), tied=tied, margin=margin, subgraph=cut.file)
