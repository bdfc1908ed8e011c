"""Export of LLaVA-1.5-7B's true configuration within 2 GB of memory beyond its largest tensor.

    python benchmarks/llava7b_export.py [--keep DIR]

Writes a model of that configuration (CLIP-L/336, 32 layers of 4096) with random fp16 weights as safetensors shards, 14 GB; builds the
recipe of `recipes/llava-1.5-7b-fastv-int4.yaml` without int4, so that every weight goes through, in a process of its own; watches that
process's memory; compares the size of `onnx/` with the weights. Needs 32 GB of disk, which it gives back.

Memory is reported twice. `VmHWM` is the most that was resident, pages of mapped files included, which the kernel may drop at any time.
`RssAnon` is what the process made itself and cannot be dropped. The bound holds for the first, the stricter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import child_memory, save, workplace
from benchmarks._models import CLIP_LARGE_336, VICUNA_7B, write_llava

ALLOWED_MIB = 2e9 / 2**20
LARGEST_MIB = 32064 * 4096 * 2 / 2**20
"""The token table."""


def write_recipe(base: Path) -> Path:
    """Write the recipe beside the model."""
    recipe = {
        "recipe": 1, "name": "llava-7b-random", "model": {"source": str(base / "model"), "dtype": "float16"},
        "inputs": {"images": 1, "image_size": [336, 336], "text_tokens": 128, "new_tokens": 256},
        "compress": [
            {"at": "projector", "method": "pool", "kernel": 2, "mode": "average"},
            {"at": "decoder.2", "method": "fastv", "keep": "50%"},
        ],
        "target": {"device": "jetson-agx-orin-64gb", "runtime": "tensorrt"},
    }  # fmt: skip
    path = base / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="a folder for the model that stays; the bundle never does")
    options = parser.parse_args()
    with workplace(32 * 10**9, options.keep) as base:
        began = time.perf_counter()
        if not (base / "model").exists():
            write_llava(base / "model", VICUNA_7B, CLIP_LARGE_336, dtype="float16")
        written = time.perf_counter() - began
        weights = sum(p.stat().st_size for p in (base / "model").glob("*.safetensors"))
        try:
            used = child_memory([sys.executable, "-m", "benchmarks._build", str(write_recipe(base)), str(base / "bundle")])
            onnx = sum(p.stat().st_size for p in (base / "bundle" / "onnx").iterdir())
        finally:
            shutil.rmtree(base / "bundle", ignore_errors=True)
    allowed = ALLOWED_MIB + LARGEST_MIB
    raw: dict[str, Any] = {**used, "weights_bytes": weights, "onnx_bytes": onnx, "write_model_seconds": written, "largest_mib": LARGEST_MIB}
    rows = [
        {"what": "weights", "figure": f"{weights / 1e9:.2f} GB"},
        {"what": "time of the whole build (hashing included)", "figure": f"{used['seconds']:.0f} s"},
        {
            "what": "peak resident memory, mapped files included (VmHWM)", "figure": f"{used['rss_mib']:.0f} MiB",
            "bound": f"≤ {allowed:.0f} MiB (2 GB + {LARGEST_MIB:.0f} MiB)", "ok": used["rss_mib"] <= allowed,
        },
        {"what": "peak of the process's own memory (RssAnon)", "figure": f"{used['anonymous_mib']:.0f} MiB"},
        {
            "what": "onnx/ ÷ weights", "figure": f"{onnx / weights:.4f}", "bound": "≤ 1.1", "ok": onnx <= 1.1 * weights,
        },
    ]  # fmt: skip
    what = "Export of LLaVA-1.5-7B's configuration, random fp16 weights in safetensors shards, pool at the projector, fastv after layer 2."
    print(save("llava7b_export", {"what": what, "rows": rows, "raw": raw}))
    if not (used["rss_mib"] <= allowed and onnx <= 1.1 * weights):
        raise SystemExit("llava7b_export: a bound is not met; see benchmarks/README.md")


if __name__ == "__main__":
    main()
