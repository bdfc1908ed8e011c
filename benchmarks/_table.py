"""Writes benchmarks/README.md from results/*.json; each result brings its own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["write_table"]

_HEAD = """# Benchmarks

Written by the scripts here from `results/*.json`; do not edit. `python benchmarks/run_all.py [name]` runs them; each makes its own inputs
and removes them. Times are of separate processes that take turns; a figure is a median (least..most). "least" compares the least times:
other work on the machine only ever adds time.
"""


def write_table(results: Path) -> None:
    """Write `README.md` beside the folder of results."""
    parts = [_HEAD]
    for path in sorted(results.glob("*.json")):
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if not isinstance(found.get("rows"), list):
            continue  # a result with a table of its own
        machine = found["hardware"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        parts.append(f"## {found['benchmark']}\n\n{found['what']}\n")
        parts.append("| what | figure | bound | |\n|---|---|---|---|")
        for row in found["rows"]:
            state = "" if row.get("ok") is None else "met" if row["ok"] else "**not met**"
            parts.append(f"| {row['what']} | {row['figure']} | {row.get('bound', '')} | {state} |")
        parts.append(
            f"\n{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; Python {machine['python']}, {versions}; "
            f"load average {machine['load_average_1min']} at the end.\n"
        )
    (results.parent / "README.md").write_text("\n".join(parts), encoding="utf-8")
