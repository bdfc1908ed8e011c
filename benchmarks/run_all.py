"""Runs the benchmarks: `python benchmarks/run_all.py [NAME ...]`, one after the other; figures need a machine that does nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NAMES = (
    "decoder036b",
    "schemes_speed",
    "schemes_accuracy",
    "schemes_error",
    "selector_share",
    "genai_compare",
    "llava7b_export",
    "llava7b_engines",
    "memory_tight",
    "engine_sizes",
    "engine_matrix",
    "decode_width",
    "decode_attention",
    "accuracy",
    "parity",
    "slot_scales",
    "resume",
)


def main() -> None:
    chosen = sys.argv[1:] or list(NAMES)
    unknown = [name for name in chosen if name not in NAMES]
    if unknown:
        raise SystemExit(f"unknown benchmark {', '.join(unknown)}; choose of: {', '.join(NAMES)}")
    failed = [n for n in chosen if subprocess.run([sys.executable, str(Path(__file__).with_name(f"{n}.py"))], check=False).returncode]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
