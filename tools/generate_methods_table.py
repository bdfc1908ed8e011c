"""Write docs/methods.md from the method library, its golden adapters and recipes and the last proofs, or say that it is out of date.

python tools/generate_methods_table.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Attention, Features, Keys, Method, Need, Sample, TextEmbeds, TextTower
from tmc_export.graphs._synthetic import layouts

__all__ = ["goldens_of", "main", "page", "recipes_of"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
HEAD = """# Methods

Written by `make methods-table` from `graphs/`, `tests/goldens/adapters/`, `recipes/` and `benchmarks/results/methods.json`; do not edit.
`tmc-export methods NAME` prints one method's paper, options and limits.

- **site**: where `at` may put it. **query**: what is kept depends on the prompt. **learned**: it has weights of its own.
- **positions**: at decoder sites, what happens to the rotary positions; before the decoder (–) the tokens that are left are numbered in
  their order.
- **static**: *by nature*, or by a budget that stands for what the official code leaves to the data.
- **needs**: what the framework captures for it, never `output_attentions`.
- **proved**: *golden*: equal to what the official code returned, every case of that file, in PyTorch and onnxruntime; *paper*: no official
  code exists, the equations were worked out by hand in its tests; *bundle*: its recipe was built and the bundle answered token for token
  like the eager reference, by `python benchmarks/methods.py` (– = not run).
"""
COLUMNS = ("method", "mechanism", "site", "query", "learned", "positions", "static", "needs", "proved")


def _need(need: Need) -> str:
    if isinstance(need, Attention):
        what = f"{need.rows} {'logits' if need.logits else 'attention'}{' of the next layer' if need.layer == 'next' else ''}"
        return f"{what}, summed" if need.row_sum else what
    if isinstance(need, Keys):
        return "keys of the next layer" if need.layer == "next" else "keys"
    if isinstance(need, TextTower):
        return "text tower"
    return {Features: "features", TextEmbeds: "text embeddings"}[type(need)]


def _needs_and_positions(method: type[Method]) -> tuple[list[str], list[str]]:
    needs: dict[str, None] = {}
    positions: dict[str, None] = {}
    for sample in method.samples or (Sample(method.sites[0].replace("<l>", "1").replace("<k>", "2")),):
        for stage, _, after in layouts(method, method.Config(**sample.options), sample.at, arriving=sample.arriving):
            needs |= dict.fromkeys(_need(n) for n in stage.needs)
            positions |= {after.positions if stage.at.part == "decoder" else "–": None}
    order: list[str] = [p for p in ("–", "keep", "renumber", "truncate") if p in positions]
    return list(needs), order


def goldens_of(name: str) -> list[str]:
    """Golden files whose adapter calls this method."""
    pattern = re.compile(rf"tmc_export\.graphs\.{name} import|from tmc_export\.graphs import {name}\b")
    adapters = sorted((ROOT / "tests" / "goldens" / "adapters").glob("[a-z]*.py"))
    return [p.stem for p in adapters if pattern.search(p.read_text("utf-8"))]


def recipes_of(name: str) -> list[str]:
    """Shipped recipes that name this method."""
    return [p.stem for p in sorted((ROOT / "recipes").glob("*.yaml")) if re.search(rf"method: {name}\b", p.read_text("utf-8"))]


def _proved(method: type[Method], built: dict[str, str]) -> Iterator[str]:
    goldens = goldens_of(method.name)
    if goldens:
        yield "golden " + ", ".join(f"`{g}`" for g in goldens)
    elif method.official == "paper only" and method.mechanism != "control":
        yield "paper"
    bundles = {built.get(r, "–") for r in recipes_of(method.name) if r.startswith("tiny-llava")} - {"–"}
    yield "bundle " + (", ".join(sorted(bundles)) if bundles else "–")


def _row(method: type[Method], built: dict[str, str]) -> list[str]:
    needs, positions = _needs_and_positions(method)
    return [
        f"[`{method.name}`](../graphs/{method.name}.py)", method.mechanism, ", ".join(f"`{s}`" for s in method.sites),
        "yes" if method.query_aware else "no", "no" if method.training_free else "yes", ", ".join(positions),
        f"budget: {method.budgets}" if method.budgets else "by nature", ", ".join(needs) or "–", "; ".join(_proved(method, built)),
    ]  # fmt: skip


def page() -> str:
    """Return the page."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"rows": []}
    built = {row["recipe"]: row["verdict"] for row in results["rows"]}
    methods = [METHODS.get(name) for name in METHODS]
    lines = [HEAD, f"{len(methods)} methods.", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(_row(m, built))} |" for m in methods]
    lines += ["", "## Papers and official code", ""]
    lines += [
        f"- `{m.name}`: {m.paper}. {'No official code.' if m.official == 'paper only' else m.official}"
        for m in methods
        if m.mechanism != "control"
    ]
    return "\n".join([*lines, ""])


def main() -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; end with code 1 when the page is out of date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        print("docs/methods.md is out of date; run: make methods-table", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
