"""Prefill and decode of the weight schemes beside fp32, on onnxruntime's CPU path.

    python benchmarks/schemes_speed.py [--rounds 7] [--keep DIR]

The decoder of `_decoder036b.py`, 640-token prompt, 576 of it visual: uncompressed, and FastV after layer 2 keeping 144. int8 w8a8 is
calibrated with SmoothQuant (0.5) on four random pictures; int4 has blocks of 32. The head stays fp32. Every measurement is a process of its
own; they take turns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import paired, save, spread, workplace
from benchmarks._decoder036b import PLANS, build, rounds_and_keep, take_turns

TOKENS, SAMPLES = 32, 4
SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8 w8a8": {"weights": "int8", "activations": "int8", "smooth": 0.5},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4", "block": 32},
}
PLAN_NAMES = ("uncompressed", "fastv_k2_144")
BOUND = 1.0
"""int8 w8a8's prefill against fp32's."""


def write_data(base: Path) -> dict[str, Any]:
    """Write pictures and questions to calibrate on; returns the recipe's `calibration`."""
    import numpy as np
    from PIL import Image

    folder = base / "calibration"
    folder.mkdir(exist_ok=True)
    for number in range(SAMPLES):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (336, 336, 3), np.uint8)).save(folder / f"{number}.png")
    lines = [json.dumps({"prompt": " ".join(["what is there"] * (1 + number))}) for number in range(SAMPLES)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return {"images": str(folder), "prompts": str(folder / "prompts.jsonl"), "samples": SAMPLES}


def main() -> None:
    options = rounds_and_keep(__doc__)
    with workplace(14 << 30, options.keep) as base:
        data = write_data(base)
        bundles: dict[str, Path] = {}
        for plan in PLAN_NAMES:
            for scheme, part in SCHEMES.items():
                calibration = {"calibration": data} if "activations" in part else {}
                changes = {"quantize": {"decoder": part, **calibration}} if part else {}
                name = plan if not part else f"{plan}_{scheme.replace(' ', '_')}"
                bundles[f"{plan}, {scheme}"] = build(base, name, PLANS[plan], **changes)
        sizes = {name: sum(p.stat().st_size for p in (path / "onnx").iterdir()) for name, path in bundles.items()}
        found = take_turns(bundles, options.rounds, TOKENS)
    rows: list[dict[str, object]] = []
    raw: dict[str, Any] = {}
    for name, runs in found.items():
        plan, _, scheme = name.partition(", ")
        times = {key: spread([t for run in runs for t in run[key]]) for key in ("prefill_ms", "token_ms")}
        ratios = {key: paired(runs, found[f"{plan}, fp32"], key) for key in times}
        raw[name] = {**times, "onnx_bytes": sizes[name], "ratios": ratios, "peak_rss_mib": spread([r["peak_rss_mib"] for r in runs])}
        bounded = scheme == "int8 w8a8"
        rows.append({
            "what": f"{plan}, {scheme}: prefill; a token; of fp32's; `onnx/`",
            "figure": f"{times['prefill_ms']['median']:.0f} ms; {times['token_ms']['median']:.1f} ms; "
            f"{ratios['prefill_ms']['median']:.3f}, {ratios['token_ms']['median']:.3f}; {sizes[name] / 1e6:.0f} MB",
            "bound": f"prefill < {BOUND}" if bounded else "",
            "ok": ratios["prefill_ms"]["median"] < BOUND if bounded else None,
        })  # fmt: skip
    what = "Schemes of a decoder of 0.36 billion weights on onnxruntime: prompt of 640 tokens, 576 visual; the head in fp32."
    print(save("schemes_speed", {"what": what, "rows": rows, "raw": raw}))


if __name__ == "__main__":
    main()
