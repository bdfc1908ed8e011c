"""Say at the end of a run which goldens were taken, and loudly which were not covered."""

from __future__ import annotations

import os
from typing import Any

from tests.goldens import _cases


def pytest_terminal_summary(terminalreporter: Any) -> None:
    names = _cases.pairs()
    origin = "TMC_GOLDENS" if os.environ.get("TMC_GOLDENS") else "the subset in tests/goldens/data (set TMC_GOLDENS for all)"
    without = [name for name in names if _cases.adapter(name) is None]
    terminalreporter.section("goldens")
    terminalreporter.write_line(f"{len(names) - len(without)} of {len(names)} golden files have an adapter; taken from {origin}")
    for name in without:
        terminalreporter.write_line(f"NOT COVERED: {name} (no tests/goldens/adapters/{name}.py)", yellow=True, bold=True)
    for name in sorted(set(names) - set(without)):
        for case in _cases.load(name):
            reason = _uncovered(case)
            if reason:
                terminalreporter.write_line(f"NOT COVERED: {case.id}: {reason}", yellow=True)


def _uncovered(case: _cases.Case) -> str:
    try:
        _cases.prepared(case)
    except _cases.NotCovered as reason:
        return str(reason)
    except ValueError:
        pass  # a refusal, which the test judges
    return ""
