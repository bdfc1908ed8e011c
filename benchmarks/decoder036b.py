"""Time won against FLOPs removed, on a 24-layer decoder of 0.36 billion weights.

    python benchmarks/decoder036b.py [--rounds 7] [--keep DIR]

The decoder has the layers of Qwen2-0.5B (896 wide, GQA 14/2, feed-forward 4864; 0.358 billion weights) and a vocabulary of 32000, random
weights, fp32. The prompt has 640 tokens, 576 of them visual. Bundles, decoder prefill alone (no picture encoder), each in processes of its
own that take turns: uncompressed; FastV after layer 2 keeping 144; pooled to 144 at the projector; and methods that cut the decoder's
inputs, cut several times, or withdraw the picture, selectors included.

FLOPs of a layer on T tokens: 2·T·(weights) + 4·T·T·896; they count what the static graph computes, masked pairs included. "Time won ÷
FLOPs removed" is (1 - t/t0) / (1 - F/F0).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import alternate, child_memory, paired, run_json, save, spread, workplace
from benchmarks._models import CLIP_TINY_336, QWEN2_036B, write_llava

PLANS = {
    "uncompressed": [],
    "fastv_k2_144": [{"at": "decoder.2", "method": "fastv", "keep": 144}],
    "pool_144": [{"at": "projector", "method": "pool", "kernel": 2, "mode": "average"}],
    "dart_144": [{"at": "decoder.0", "method": "dart", "keep": 144}],
    "divprune_144": [{"at": "decoder.0", "method": "divprune", "keep": 144}],
    "pyramiddrop": [{"at": "decoder.6", "method": "pyramiddrop", "layers": [6, 12, 18]}],
    "sparsevlm": [{"at": "decoder.3", "method": "sparsevlm"}],
    "zipvl_144": [{"at": "decoder.2", "method": "zipvl", "keep": [144]}],
    "vtw": [{"at": "decoder.12", "method": "vtw"}],
}
BOUND = 0.95


def layer_flops(tokens: int) -> int:
    """Operations of one decoder layer on a prompt."""
    d, width, ffn = 896, 896 + 2 * 128, 4864
    return 2 * tokens * (d * width + d * d + 3 * d * ffn) + 4 * tokens * tokens * d


def flops(layers_on: dict[int, int]) -> int:
    """Operations of a prefill: tokens → number of layers that see them."""
    return sum(layers * layer_flops(tokens) for tokens, layers in layers_on.items())


def ideal(bundle: Path) -> int:
    """Operations of a bundle's prefill, by the tokens that its blocks take."""
    from tmc_export.bundle.read import open_manifest

    found: dict[int, int] = {}
    for block in open_manifest(bundle).program.blocks:
        found[block.tokens] = found.get(block.tokens, 0) + block.last - block.first
    return flops(found)


def build(base: Path, name: str, compress: list[dict[str, Any]], **changes: Any) -> Path:
    """Build a bundle of the model in `base/model`, unless it is there."""
    import json

    out = base / name
    if not (out / "manifest.json").is_file():
        recipe = {
            "recipe": 1, "name": name.replace("_", "-"), "model": {"source": str(base / "model"), "dtype": "float32"},
            "inputs": {"images": 1, "text_tokens": 64, "new_tokens": 64}, "compress": compress,
            "target": {"device": "cpu", "runtime": "onnxruntime"}, **changes,
        }  # fmt: skip
        path = base / f"{name}.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        child_memory([sys.executable, "-m", "benchmarks._build", str(path), str(out)])
    return out


def measure(bundle: Path, prefills: int, tokens: int = 0, accuracy: int = 4, threads: int | None = None) -> dict[str, Any]:
    """Time a bundle's decoder once."""
    flags = ["--prefills", str(prefills), "--tokens", str(tokens), "--accuracy", str(accuracy)]
    flags += [] if threads is None else ["--threads", str(threads)]
    return run_json([sys.executable, "-m", "benchmarks._decoder_worker", str(bundle), *flags])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", help="a folder for model and bundles that stays")
    options = parser.parse_args()
    with workplace(22 << 30, options.keep) as base:
        if not (base / "model").exists():
            write_llava(base / "model", QWEN2_036B, CLIP_TINY_336)
        bundles = {name: build(base, name, compress) for name, compress in PLANS.items()}
        operations = {name: ideal(path) for name, path in bundles.items()}
        found = alternate({name: partial(measure, path, 3) for name, path in bundles.items()}, options.rounds)
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
