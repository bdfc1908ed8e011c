"""Time won against FLOPs removed, on a 24-layer decoder of 0.36 billion weights.

    python benchmarks/decoder036b.py [--rounds 7] [--keep DIR]

The bundles are those of `_decoder036b.py`, in fp32, decoder prefill alone (no picture encoder), each in processes of its own that take
turns: uncompressed; FastV after layer 2 keeping 144; pooled to 144 at the projector; and methods that cut the decoder's inputs, cut several
times, or withdraw the picture, selectors included.

FLOPs of a layer on T tokens: 2·T·(weights) + 4·T·T·896; they count what the static graph computes, masked pairs included. "Time won ÷
FLOPs removed" is (1 - t/t0) / (1 - F/F0).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import paired, save, spread, workplace
from benchmarks._decoder036b import PLANS, build, flops, ideal, measure, rounds_and_keep, take_turns

__all__ = ["PLANS", "build", "flops", "measure"]

BOUND = 0.95


def main() -> None:
    options = rounds_and_keep(__doc__)
    with workplace(22 << 30, options.keep) as base:
        bundles = {name: build(base, name, compress) for name, compress in PLANS.items()}
        operations = {name: ideal(path) for name, path in bundles.items()}
        found = take_turns(bundles, options.rounds)
    base_runs = found["uncompressed"]
    rows: list[dict[str, object]] = []
    raw: dict[str, Any] = {}
    for name, runs in found.items():
        times = spread([t for run in runs for t in run["prefill_ms"]])
        raw[name] = {"prefill_ms": times, "flops": operations[name], "peak_rss_mib": spread([r["peak_rss_mib"] for r in runs])}
        row: dict[str, object] = {
            "what": f"{name}: prefill",
            "figure": f"{times['median']:.0f} ms ({times['min']:.0f}..{times['max']:.0f}), {operations[name] / 1e9:.0f} GFLOP",
        }
        rows.append(row)
        if name == "uncompressed":
            continue
        ratio = paired(runs, base_runs, "prefill_ms")
        removed = 1 - operations[name] / operations["uncompressed"]
        won = {key: (1 - ratio[key]) / removed for key in ("median", "of_least")}
        raw[name] |= {"time_ratio": ratio, "flops_removed": removed, "won_over_removed": won}
        bound = BOUND if name.startswith("fastv") else None
        rows.append({
            "what": f"{name}: faster by (ideal by FLOPs)",
            "figure": f"{1 / ratio['median']:.2f}× ({operations['uncompressed'] / operations[name]:.2f}×)",
        })  # fmt: skip
        rows.append({
            "what": f"{name}: time won ÷ FLOPs removed",
            "figure": f"{won['median']:.3f} (least {won['of_least']:.3f})",
            "bound": "" if bound is None else f"≥ {bound}",
            "ok": None if bound is None else won["median"] >= bound,
        })  # fmt: skip
    what = "Decoder of 0.36 billion weights (24 layers, 896 wide, GQA 14/2), fp32, random weights; prompt of 640 tokens, 576 visual."
    print(save("decoder036b", {"what": what, "rows": rows, "raw": raw}))


if __name__ == "__main__":
    main()
