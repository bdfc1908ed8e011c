"""What huge pages are worth: decoding, prefill, loading and memory with and without them.

    python benchmarks/huge_pages.py [--rounds 15] [--keep DIR]

The uncompressed 0.36B decoder of `decoder036b.py` at float32 and int4, each in processes of its own that take turns. Ratios are huge pages
to small ones; where Linux does not give huge pages on request (`transparent_hugepage/enabled` is not `madvise`) all of them are 1 and the
script refuses to measure.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import alternate, median_interval, paired, save, spread, workplace
from benchmarks._models import CLIP_TINY_336, QWEN2_036B, write_llava
from benchmarks.decoder036b import build, measure

INT4 = {"decoder": {"weights": "int4", "block": 32}}
KINDS = {"decode": "token_ms", "prefill": "prefill_ms", "loading": "load_ms"}
TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keep", help="a folder for model and bundles that stays")
    options = parser.parse_args()
    if "[madvise]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text("ascii"):
        raise SystemExit("this kernel does not give huge pages on request; nothing to compare")
    with workplace(8 << 30, options.keep) as base:
        if not (base / "model").exists():
            write_llava(base / "model", QWEN2_036B, CLIP_TINY_336)
        full, int4 = build(base, "uncompressed", []), build(base, "uncompressed_int4", [], quantize=INT4)
        graphs = {"fp32": (full, 4), "int4 level 4": (int4, 4), "int4 level 1": (int4, 1)}
        found = alternate(
            {
                f"{name} {pages}": partial(measure, bundle, 2, TOKENS, level, None, pages == "small")
                for name, (bundle, level) in graphs.items()
                for pages in ("huge", "small")
            },
            options.rounds,
        )
    rows: list[dict[str, object]] = []
    raw: dict[str, Any] = {}
    for name in graphs:
        pair = found[f"{name} huge"], found[f"{name} small"]
        for kind, key in KINDS.items():
            times = [spread([t for run in runs for t in run[key]]) for runs in pair]
            ratio = paired(*pair, key)
            low, high = median_interval([median(a[key]) / median(b[key]) for a, b in zip(*pair, strict=True)])
            raw[f"{kind} {name}"] = {"huge_ms": times[0], "small_ms": times[1], "ratio": ratio | {"low": low, "high": high}}
            rows.append({
                "what": f"{kind}, {name}: huge pages; small; ratio",
                "figure": f"{times[0]['median']:.1f} ms; {times[1]['median']:.1f} ms; {ratio['median']:.3f} ({low:.3f} to {high:.3f})",
            })  # fmt: skip
        peaks = [spread([r["peak_rss_mib"] for r in runs]) for runs in pair]
        raw[f"peak_rss_mib {name}"] = dict(zip(("huge", "small"), peaks, strict=True))
        rows.append({"what": f"peak memory, {name}: huge pages; small", "figure": "; ".join(f"{p['median']:.0f} MiB" for p in peaks)})
    what = "The 0.36B decoder with its packed weights in pages of 2 MiB and of 4 KiB; a ratio's median and the order statistics around it."
    print(save("huge_pages", {"what": what, "rows": rows, "raw": raw}))


if __name__ == "__main__":
    main()
