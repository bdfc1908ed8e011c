"""Builds one bundle in a process of its own: `python -m benchmarks._build RECIPE OUT [--engines] [KEY=VALUE ...]`.

The last line of its output is JSON: the bundle's folder, and every step with the second at which it began.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def main() -> None:
    from tmc_export.api.bundling import build_bundle

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--engines", action="store_true")
    given = parser.parse_args()
    began, steps = time.perf_counter(), []

    def progress(step: str) -> None:
        steps.append((time.perf_counter() - began, step))
        print(step, file=sys.stderr, flush=True)

    result = build_bundle(given.recipe, given.out, overrides=given.overrides, record=False, engines=given.engines, progress=progress)
    print(json.dumps({"folder": str(result.folder), "steps": [*steps, (time.perf_counter() - began, "end")]}))


if __name__ == "__main__":
    main()
