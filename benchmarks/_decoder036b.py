"""The 24-layer decoder of 0.36 billion weights that several benchmarks time: its bundles, their operations, and one measurement.

The layers are those of Qwen2-0.5B (896 wide, GQA 14/2, feed-forward 4864; 0.358 billion weights) with a vocabulary of 32000 and random
weights. The prompt has 640 tokens, 576 of them visual.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._common import alternate, child_memory, run_json
from benchmarks._models import CLIP_TINY_336, QWEN2_036B, write_llava

__all__ = ["PLANS", "build", "flops", "ideal", "measure", "rounds_and_keep", "take_turns", "worker"]

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
    """Build a bundle of the decoder in `base/model`; what is there already, model or bundle, is taken."""
    if not (base / "model").exists():
        write_llava(base / "model", QWEN2_036B, CLIP_TINY_336)
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


def worker(bundle: Path, prefills: int, tokens: int = 0, accuracy: int = 4, threads: int | None = None, *more: str) -> list[str]:
    """The command that times a bundle's decoder."""
    flags = ["--prefills", str(prefills), "--tokens", str(tokens), "--accuracy", str(accuracy), *more]
    flags += [] if threads is None else ["--threads", str(threads)]
    return [sys.executable, "-m", "benchmarks._decoder_worker", str(bundle), *flags]


def measure(bundle: Path, prefills: int, tokens: int = 0, accuracy: int = 4, threads: int | None = None) -> dict[str, Any]:
    """Time a bundle's decoder once."""
    return run_json(worker(bundle, prefills, tokens, accuracy, threads))


def take_turns(bundles: Mapping[str, Path], rounds: int, tokens: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Time three prefills of every bundle, and the decoding of some tokens, each in a process of its own; the bundles take turns."""
    return alternate({name: partial(measure, path, 3, tokens) for name, path in bundles.items()}, rounds)


def rounds_and_keep(description: str | None) -> argparse.Namespace:
    """Read `--rounds` and `--keep`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", help="a folder for model and bundles that stays")
    return parser.parse_args()
