"""What a climb of the parity ladder found: rungs, their checks, and how they are told. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tmc_export.core.errors import ParityError
from tmc_export.verify.compare import Check, Metrics, worst

__all__ = ["Ladder", "Rung", "not_run", "rung_of"]

Status = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Rung:
    """One rung.

    Attributes:
        name: `"onnxruntime end to end"`.
        status: passed, failed or not run.
        note: why it did not run, or what is worth saying.
        checks: the comparisons.
    """

    name: str
    status: Status
    note: str = ""
    checks: tuple[Check, ...] = ()

    @property
    def failures(self) -> tuple[Check, ...]:
        """The comparisons that failed, in the order they ran."""
        return tuple(c for c in self.checks if not c.passed)

    @property
    def exceptions(self) -> tuple[str, ...]:
        """Kept indices that differ within the tie margin."""
        return tuple(e for c in self.checks for e in c.exceptions)

    @property
    def worst(self) -> Metrics | None:
        """The worst figure of each kind."""
        return worst(self.checks)

    def line(self) -> str:
        """Say the rung in one line."""
        if self.status == "not run":
            return f"{self.name}: not run: {self.note}"
        parts = [f"{self.name}: {self.status}"]
        if self.checks:
            parts.append(f"{len(self.checks) - len(self.failures)} of {len(self.checks)} checks")
        if (figures := self.worst) is not None:
            parts.append(
                f"max abs {figures.max_abs:.2g}, relative {figures.max_rel:.2g}, cosine {figures.cosine:.7f}, SQNR {figures.sqnr_db:.1f} dB"
            )
            if figures.kl is not None and figures.top1 is not None:
                parts.append(f"top-1 {figures.top1:.1%}, KL {figures.kl:.2g}")
        if any("/" in c.name for c in self.checks):
            parts.append(f"{len(self.exceptions)} ties")
        if left_out := sum(c.note.startswith("left out") for c in self.checks):
            parts.append(f"{left_out} comparisons left out after them")
        return "; ".join([*parts, *([self.note] if self.note else [])])

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        figures = self.worst
        return {
            "name": self.name,
            "status": self.status,
            "note": self.note,
            "checks": len(self.checks),
            "worst": None if figures is None else figures.to_json(),
            "exceptions": list(self.exceptions),
            "failures": [
                {"name": c.name, "subgraph": c.subgraph, "note": c.note, "metrics": None if c.metrics is None else c.metrics.to_json()}
                for c in self.failures
            ],
        }


def not_run(name: str, reason: str) -> Rung:
    """Return a rung that says why it did not run."""
    return Rung(name, "not run", reason)


def rung_of(name: str, checks: Sequence[Check], note: str = "") -> Rung:
    """Return a rung from its checks; none at all is a failure, and so is one in which only ties were left."""
    told = tuple(checks)
    if not any(c.metrics is not None for c in told) and all(c.passed for c in told):
        return Rung(name, "failed", "nothing could be compared" + (f"; {note}" if note else ""), told)
    return Rung(name, "passed" if all(c.passed for c in told) else "failed", note, told)


@dataclass(frozen=True)
class Ladder:
    """All rungs, in order."""

    rungs: tuple[Rung, ...]

    @property
    def passed(self) -> bool:
        """No rung failed, and at least one ran."""
        return all(r.status != "failed" for r in self.rungs) and any(r.status == "passed" for r in self.rungs)

    @property
    def first_bad(self) -> Check | None:
        """The first failed comparison of a subgraph, else the first failed one at all."""
        failures = [c for r in self.rungs for c in r.failures]
        return next((c for c in failures if c.subgraph is not None), failures[0] if failures else None)

    def rung(self, name: str) -> Rung:
        """Return the rung of that name."""
        return next(r for r in self.rungs if r.name == name)

    def text(self) -> str:
        """Say every rung in a line, with the failures and the exceptions under it."""
        lines: list[str] = []
        for rung in self.rungs:
            lines.append(rung.line())
            for check in rung.failures[:5]:
                place = f" ({check.subgraph})" if check.subgraph else ""
                lines.append(f"    failed: {check.name}{place}: {check.note}")
            if len(rung.failures) > 5:
                lines.append(f"    and {len(rung.failures) - 5} more")
            lines += [f"    tie: {text}" for text in rung.exceptions]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        bad = self.first_bad
        return {
            "passed": self.passed,
            "first_bad": None if bad is None else {"name": bad.name, "subgraph": bad.subgraph, "note": bad.note},
            "rungs": [r.to_json() for r in self.rungs],
        }

    def proofs(self) -> dict[str, str]:
        """Rung → what the manifest's `proofs` say."""
        return {r.name: r.line().split(": ", 1)[1] for r in self.rungs}

    def raise_if_failed(self) -> None:
        """Raise when a rung failed.

        Raises:
            ParityError: names the first bad subgraph.
        """
        if self.passed:
            return
        bad = self.first_bad
        if bad is None:
            failed = next((r.line() for r in self.rungs if r.status == "failed"), "no rung ran")
            raise ParityError(f"parity was not shown: {failed}")
        what = f"the first bad subgraph is {bad.subgraph}" if bad.subgraph else "no single subgraph is to blame"
        raise ParityError(f"{what}: {bad.name}: {bad.note}; build the bundle again, and report it if that does not help")
