"""Every shipped tiny-llava recipe, built and compared with the eager reference.

    python benchmarks/methods.py
    python benchmarks/methods.py --only fastv visionzip [--add]

A build records what the independent PyTorch reference answers to made-up conversations (greedy tokens, logits at every step, kept sets) and
plays them through the finished bundle, whole and chunked; a difference ends the build. A row is one recipe: the tokens of a picture before
and after, and the verdict. Writes results/methods.json, which docs/methods.md quotes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks._common import save  # noqa: E402

__all__ = ["prove", "recipes"]

_RUNG = "onnxruntime end to end"


def recipes(only: list[str]) -> list[Path]:
    """Shipped recipes of the small model, by method name where `only` names some."""
    found = sorted((REPOSITORY / "recipes").glob("tiny-llava-*-fp32.yaml"))
    return [p for p in found if not only or any(re.search(rf"method: {name}\b", p.read_text("utf-8")) for name in only)]


def prove(recipe: Path, folder: Path) -> dict[str, Any]:
    """Build one recipe; what came of it."""
    from tmc_export.api import build
    from tmc_export.core.errors import TmcError

    began = time.perf_counter()
    try:
        manifest = build(recipe, folder / recipe.stem, engines=False).manifest
    except TmcError as error:
        verdict = f"failed: {' '.join(str(error).split())[:200]}"
        return {"what": recipe.stem, "figure": verdict, "ok": False, "recipe": recipe.stem, "verdict": verdict}
    program, outcome = manifest.program, manifest.proofs.get(_RUNG, "not run")
    tokens = [program.vision[0].full_grid[0] * program.vision[0].full_grid[1], program.vision[0].tokens]
    tokens += [cut.visual_out // program.images for cut in program.cuts]
    verdict = "ok" if outcome.startswith("passed") else outcome
    return {
        "what": recipe.stem, "figure": f"{' → '.join(map(str, tokens))} visual tokens; {outcome}", "ok": verdict == "ok",
        "recipe": recipe.stem, "verdict": verdict, "tokens": tokens, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main() -> int:
    """Prove the recipes; the exit code is 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="recipes of these methods; nothing is written")
    parser.add_argument("--add", action="store_true", help="with --only: the new rows take their places among the written ones")
    arguments = parser.parse_args()
    only, rows = arguments.only, []
    with tempfile.TemporaryDirectory(prefix="tmc-methods-") as folder:
        for recipe in recipes(only):
            rows.append(prove(recipe, Path(folder)))
            print(f"{rows[-1]['what']}: {rows[-1]['figure']}", flush=True)
    if arguments.add:
        shipped, new = {p.stem for p in recipes([])}, {row["recipe"] for row in rows}
        old = json.loads((REPOSITORY / "benchmarks" / "results" / "methods.json").read_text("utf-8"))["rows"]
        kept = [row for row in old if row["recipe"] in shipped - new]
        rows = sorted([*kept, *rows], key=lambda row: str(row["recipe"]))
    if arguments.add or not only:
        what = "Every shipped recipe of tiny-llava: built, and compared with the eager reference token for token."
        save("methods", {"what": what, "rows": rows})
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
