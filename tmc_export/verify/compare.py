"""Comparing what came out with what should have: element by element, never by means; something missing is a failure.

Legend: n elements, t steps, v vocabulary, k kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.verify.tolerances import Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Check", "Metrics", "compare_indices", "compare_logits", "compare_outputs", "compare_tensor", "measure", "worst"]


@dataclass(frozen=True)
class Metrics:
    """How far a tensor is from what was expected.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: `max_abs` / largest expected magnitude.
        cosine: of the two as vectors.
        sqnr_db: signal-to-noise ratio in dB; infinite when equal.
        top1: share of steps whose most likely token is the same; logits only.
        kl: largest KL divergence (expected from got) over the steps, in nats; logits only.
    """

    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    top1: float | None = None
    kl: float | None = None

    def to_json(self) -> dict[str, float | str | None]:
        """Return plain numbers; infinity as a string, which JSON has no number for."""
        return {k: str(v) if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared: `"one/turn 1/logits"`.
        subgraph: the bundle's file that made it, if one did.
        passed: within the tolerance, or excused.
        note: why it failed, or what is worth saying.
        metrics: figures, for tensors.
        exceptions: kept indices that differ within the tie margin; counted and printed.
    """

    name: str
    subgraph: str | None
    passed: bool
    note: str = ""
    metrics: Metrics | None = None
    exceptions: tuple[str, ...] = field(default=())


def measure(got: Array, want: Array) -> Metrics:
    """Compare two tensors of one shape, in float64."""
    a, b = np.asarray(got, np.float64).ravel(), np.asarray(want, np.float64).ravel()
    if not a.size:
        return Metrics(0.0, 0.0, 1.0, float("inf"))
    difference, scale = np.abs(a - b), float(np.abs(b).max())
    signal, noise = float((b * b).sum()), float((difference * difference).sum())
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(not a.any() and not b.any())
    sqnr = float("inf") if noise == 0 else 10 * float(np.log10(signal / noise)) if signal else float("-inf")
    largest = float(difference.max())
    return Metrics(largest, largest / scale if scale else float(largest > 0), cosine, sqnr)


def compare_tensor(name: str, got: Array | None, want: Array, tolerance: Tolerance, subgraph: str | None = None) -> Check:
    """Compare a float tensor: every element within `atol + rtol * max|want|`, and the noise below the table's."""
    problem = _shape_problem(got, want)
    if problem or got is None:
        return Check(name, subgraph, False, problem)
    figures = measure(got, want)
    allowed = tolerance.atol + tolerance.rtol * float(np.abs(want).max(initial=0.0))
    if not figures.max_abs <= allowed:
        where = np.unravel_index(int(np.abs(np.asarray(got, np.float64) - want).argmax()), want.shape)
        place = ", ".join(str(int(i)) for i in where)
        return Check(name, subgraph, False, f"differs by {figures.max_abs:.3g} at [{place}], allowed {allowed:.3g}", figures)
    if figures.sqnr_db < tolerance.sqnr_db and figures.max_abs > tolerance.atol:
        return Check(name, subgraph, False, f"SQNR {figures.sqnr_db:.1f} dB, at least {tolerance.sqnr_db:g} dB is asked", figures)
    return Check(name, subgraph, True, metrics=figures)


def compare_logits(name: str, got: Array | None, want: Array, tolerance: Tolerance, subgraph: str | None = None) -> Check:
    """Compare logits `[t, v]` at every step: as tensors, by KL, and by the most likely token where that is no near-tie."""
    check = compare_tensor(name, got, want, tolerance, subgraph)
    if got is None or check.metrics is None:
        return check
    allowed = tolerance.atol + tolerance.rtol * float(np.abs(want).max(initial=0.0))
    same = got.argmax(-1) == want.argmax(-1)
    best = np.sort(want, -1)
    clear = best[:, -1] - best[:, -2] > allowed
    divergence = float(_kl(want, got).max())
    figures = Metrics(**{**asdict(check.metrics), "top1": float(same.mean()), "kl": divergence})
    if not check.passed:
        return Check(name, subgraph, False, check.note, figures)
    if divergence > tolerance.kl:
        return Check(name, subgraph, False, f"KL {divergence:.3g} nats, at most {tolerance.kl:g} is allowed", figures)
    wrong = np.flatnonzero(~same & clear)
    if tolerance.same_tokens and wrong.size:
        return Check(name, subgraph, False, f"another token at step {int(wrong[0])}, where the two best are clearly apart", figures)
    near = int((~same).sum())
    return Check(name, subgraph, True, f"{near} of {len(same)} tokens differ within the tolerance" if near else "", figures)


def _kl(want: Array, got: Array) -> Array:
    """KL divergence per row, in nats."""
    p, q = _log_softmax(want), _log_softmax(got)
    result: Array = (np.exp(p) * (p - q)).sum(-1)
    return np.maximum(result, 0.0)


def _log_softmax(logits: Array) -> Array:
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    result: Array = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def compare_indices(
    name: str, got: Array | None, want: Array, *, tied: bool, margin: float | None = None, subgraph: str | None = None
) -> Check:
    """Compare kept indices, which must be equal unless the choice is a tie.

    Args:
        name: see `Check`.
        got: `[k]`, or None when the output is missing.
        want: `[k]`.
        subgraph: see `Check`.
        tied: the table's margin bound calls this choice a tie.
        margin: the relative k-th margin, for the message.
    """
    problem = _shape_problem(got, want)
    if problem or got is None:
        return Check(name, subgraph, False, problem)
    if np.array_equal(got, want):
        return Check(name, subgraph, True)
    lost, new = sorted(set(want.tolist()) - set(got.tolist())), sorted(set(got.tolist()) - set(want.tolist()))
    overlap = 1 - len(lost) / max(len(want), 1)
    how = "tried with noise" if margin is None else f"k-th margin {margin:.2g}"
    text = f"{name}: kept {new} instead of {lost} (overlap {overlap:.1%}, {how})"
    if tied:
        return Check(name, subgraph, True, "a tie", exceptions=(text,))
    return Check(name, subgraph, False, f"kept {new[:8]} instead of {lost[:8]}: overlap {overlap:.1%}, no tie ({how})")


def compare_outputs(
    name: str, got: Mapping[str, Array], want: Mapping[str, Array], tolerance: Tolerance, subgraph: str | None = None
) -> tuple[Check, ...]:
    """Compare tensors by name; a name that is expected and missing is a failure."""
    return tuple(compare_tensor(f"{name}/{key}", got.get(key), value, tolerance, subgraph) for key, value in want.items())


def _shape_problem(got: Array | None, want: Array) -> str:
    if got is None:
        return "the output is missing"
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}"
    if got.dtype.kind == "f" and not np.isfinite(got).all():
        return f"{int((~np.isfinite(got)).sum())} of {got.size} values are not finite"
    return ""


def worst(checks: Iterable[Check]) -> Metrics | None:
    """Return the worst figure of each kind over some checks; None when none has figures."""
    found: Sequence[Metrics] = [c.metrics for c in checks if c.metrics is not None]
    if not found:
        return None
    top1 = [m.top1 for m in found if m.top1 is not None]
    kl = [m.kl for m in found if m.kl is not None]
    return Metrics(
        max(m.max_abs for m in found),
        max(m.max_rel for m in found),
        min(m.cosine for m in found),
        min(m.sqnr_db for m in found),
        min(top1) if top1 else None,
        max(kl) if kl else None,
    )
