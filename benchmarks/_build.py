"""Builds one bundle in a process of its own: `python benchmarks/_build.py RECIPE OUT`."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    from tmc_export.api.bundling import build_bundle

    result = build_bundle(Path(sys.argv[1]), Path(sys.argv[2]), record=False, engines=False, progress=lambda s: print(s, file=sys.stderr))
    print(result.folder)


if __name__ == "__main__":
    main()
