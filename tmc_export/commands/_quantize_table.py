"""What `tmc-export quantize --explain` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmc_export.api.budget import BudgetResult
    from tmc_export.api.measuring import Effect
    from tmc_export.api.sensitivity import Explained, Row

__all__ = ["budget_lines", "explained_json", "explained_lines"]

_HELD = {"rows": "the rows kept", "mix": "the rows' mixture", "none": "nothing: its choice is no selection or linear map"}


def explained_lines(found: Explained) -> list[str]:
    """Return the report, line by line."""
    what = f"answers of at most {found.tokens} tokens" if found.answers else "first answer tokens"
    head = f"{found.recipe}: {found.samples} questions; each row alone rounded, all else float32, the worst first ({what})"
    return [
        head, *_table(found), *_subgraphs(found), *_scores(found), *_not_run(found),
    ]  # fmt: skip


def _table(found: Explained) -> Iterator[str]:
    held = found.total.frozen is not None
    other = "changed" if found.answers else "1st diff"
    names = ("", "SQNR dB", "KL nats", other, *(("kept", "SQNR dB", "KL nats", other) if held else ()))
    rows = [_cells(row, found.answers, held) for row in found.rows]
    total = _cells(found.total, found.answers, held)
    widths = [max(len(r[i]) for r in (names, *rows, total)) for i in range(len(names))]
    if held:
        left = sum(widths[1:5]) + 6
        yield " " * (widths[0] + 2) + f"{'end to end':^{left}}  {'float32 choices held':^{sum(widths[5:]) + 4}}".rstrip()
    for row in (names, *rows, total):
        first = f"{row[0]:<{widths[0]}}"
        yield "  ".join([first, *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]).rstrip()
    yield f"everything together, decoded: {_changed(found.total.end_to_end)}{_held_total(found.total)}"


def _cells(row: Row, answers: bool, held: bool) -> tuple[str, ...]:
    name = f"{row.unit.part} {row.unit.label}".strip()
    cells = [name, *_effect(row.end_to_end, answers)]
    if held:
        kept = row.end_to_end.kept
        cells += ["-" if kept is None else f"{kept:.1%}"]
        cells += ["-"] * 3 if row.frozen is None else _effect(row.frozen, answers)
    return tuple(cells)


def _effect(effect: Effect, answers: bool) -> list[str]:
    other = effect.changed if answers else effect.samples - effect.first
    return [_db(effect.sqnr_db), f"{effect.kl:.2g}", f"{other}/{effect.samples}"]


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def _changed(effect: Effect) -> str:
    return f"{effect.changed} of {effect.samples} answers change end to end"


def _held_total(row: Row) -> str:
    return "" if row.frozen is None else f", {row.frozen.changed} with float32's choices held"


def _subgraphs(found: Explained) -> Iterator[str]:
    yield "each subgraph on float32's inputs, everything rounded, choices held (SQNR dB):"
    for graph, outputs in found.sqnr_db.items():
        yield f"  {graph}: " + ", ".join(f"{name} {_db(value)}" for name, value in outputs.items())


def _scores(found: Explained) -> Iterator[str]:
    if not found.kinds:
        yield "no method selects or merges: there are no choices to hold"
    for stage, kind in found.kinds.items():
        yield f"{stage}: held is {_HELD[kind]}"
    for each in found.scores:
        yield f"{each.stage} scores with {each.reads}: {each.state}"
    if found.scores:
        yield "the arithmetic of score, top-k and gather is never quantized"


def _not_run(found: Explained) -> Iterator[str]:
    for part, words in found.kept.items():
        yield f"kept by the recipe, {part}: {', '.join(words)}"
    if not found.answers:
        yield "rows: whole answers were not decoded; --answers decodes them"
    if found.dtype != "float32":
        yield f"what is not rounded is reckoned in float32; the rounding of {found.dtype} arithmetic was not run"


def budget_lines(found: BudgetResult) -> list[str]:
    """Return the report of a budget, line by line."""
    keep = [f"  quantize.{part}.keep: {', '.join(words)}" for part, words in found.keep.items()]
    return [
        f"{found.recipe}: {len(found.pinned)} of {found.units} units pinned; {found.before} of {found.samples} answers changed before, "
        f"{found.after} do now, {found.allowed} may (a budget of {100 * found.budget:.3g}%, answers of at most {found.tokens} tokens)",
        *(keep or ["  nothing has to be kept: the copy says what the recipe says"]),
        f"the worst units were pinned first; {found.tried} sets were tried",
    ]


def explained_json(found: Explained) -> dict[str, Any]:
    """Return plain data; infinity as a string, which JSON has no number for."""
    return {
        "recipe": found.recipe, "dtype": found.dtype, "by": found.by, "samples": found.samples, "tokens": found.tokens,
        "decoded": {"rows": found.answers, "total": True},
        "rows": [_row(row) for row in found.rows], "total": _row(found.total),
        "subgraphs": {graph: {k: _number(v) for k, v in outputs.items()} for graph, outputs in found.sqnr_db.items()},
        "choices": dict(found.kinds), "scores": [asdict(each) for each in found.scores], "quantized_scores": False,
        "kept": {part: list(words) for part, words in found.kept.items()},
    }  # fmt: skip


def _row(row: Row) -> dict[str, Any]:
    return {
        "part": row.unit.part, "unit": row.unit.label, "keep": list(row.unit.words), "weights": len(row.unit.names),
        "end_to_end": _plain(row.end_to_end), "frozen": None if row.frozen is None else _plain(row.frozen),
    }  # fmt: skip


def _plain(effect: Effect) -> dict[str, Any]:
    return {key: _number(value) for key, value in asdict(effect).items()}


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
