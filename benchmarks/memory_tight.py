"""Peak memory of a process that runs a bundle where memory is tight: its prompt twice and 32 tokens, against the weights on disk.

    python benchmarks/memory_tight.py [--keep DIR] [--schemes fp32 int4]

The 0.36B decoder of `decoder036b.py`, uncompressed, 640-token prompt, random weights; fp32, fp16, and fp32 with the decoder's linears as
int8 or int4 codes (token table and head in fp32). Each bundle is run on onnxruntime's CPU path with and without `memory_tight`, each time
in a process of its own. The peak is `VmHWM`: resident memory, pages of mapped files included. Weights are the bytes of `onnx/*.data`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import run_json, save, workplace
from benchmarks._models import CLIP_TINY_336, QWEN2_036B, write_llava
from benchmarks.decoder036b import build

TOKENS = 32
SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"model": "float16"},
    "int8": {"quantize": {"decoder": {"weights": "int8"}}},
    "int4": {"quantize": {"decoder": {"weights": "int4", "block": 32}}},
}
BOUNDS = dict.fromkeys(SCHEMES, 1.3)
"""Of the whole process: Python and onnxruntime (about 70 MB), activations and, in float16, one weight in float32 are in it."""


def run(base: Path, scheme: str) -> dict[str, Any]:
    """Build a bundle, run it with and without `memory_tight`, remove it."""
    changes = dict(SCHEMES[scheme])
    model = {"model": {"source": str(base / "model"), "dtype": changes.pop("model", "float32")}}
    target = {"target": {"device": "cpu", "runtime": "onnxruntime", "memory_tight": True}}
    bundle = build(base, f"{scheme}_tight", [], **changes, **model, **target)
    try:
        weights = sum(p.stat().st_size for p in (bundle / "onnx").glob("*.data"))
        planned = json.loads((bundle / "report" / "plan.json").read_text("utf-8"))["memory"]["run"]["total"]
        found = {flag: measure(bundle, flag) for flag in ("--tight", "--no-tight")}
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
    return {"weights_bytes": weights, "planned_bytes": planned, "tight": found["--tight"], "default": found["--no-tight"]}


def measure(bundle: Path, flag: str) -> dict[str, float]:
    """One process: a prompt, another one, which meets what the first has left, and the tokens behind it."""
    command = [sys.executable, "-m", "benchmarks._decoder_worker", str(bundle), "--prefills", "1", "--tokens", str(TOKENS), flag]
    found = run_json(command)
    return {"peak_bytes": found["peak_rss_mib"] * 2**20, "token_ms": statistics.median(found["token_ms"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="a folder for the model that stays; the bundles never do")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    with workplace(8 << 30, options.keep) as base:
        if not (base / "model").exists():
            write_llava(base / "model", QWEN2_036B, CLIP_TINY_336)
        for scheme in options.schemes:
            found = raw[scheme] = run(base, scheme)
            tight, default, weights = found["tight"], found["default"], found["weights_bytes"]
            ratio, bound = tight["peak_bytes"] / weights, BOUNDS.get(scheme)
            figure = f"{ratio:.2f} ({default['peak_bytes'] / weights:.2f}): {tight['peak_bytes'] / 1e6:.0f} MB for {weights / 1e6:.0f} MB"
            figure += f", reckoned {found['planned_bytes'] / 1e6:.0f}; a token {tight['token_ms']:.0f} ms ({default['token_ms']:.0f})"
            limit = {"bound": f"≤ {bound}", "ok": ratio <= bound} if bound is not None else {}
            rows.append({"what": f"{scheme}: peak ÷ weights under memory_tight (else)", "figure": figure, **limit})
            print(rows[-1]["figure"], file=sys.stderr, flush=True)
    what = f"Peak resident memory of a decoder of 0.36 billion weights on onnxruntime: two prompts of 640 tokens and {TOKENS} tokens."
    print(save("memory_tight", {"what": what, "rows": rows, "raw": raw}))
    if any(row.get("ok") is False for row in rows):
        raise SystemExit("memory_tight: a bound is not met; see benchmarks/README.md")


if __name__ == "__main__":
    main()
