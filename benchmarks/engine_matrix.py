"""TensorRT-RTX engines of every scheme for SM86, SM89 and SM120: size, kernels, fused attention; and what `plan` refuses.

    python benchmarks/engine_matrix.py [--keep DIR] [SCHEME ...]

A LLaVA with a tiny tower and two layers of Llama-3.2-3B's shape, random, with fastv between them; the decoder under each scheme, from a
recipe. Engines of all subgraphs are built one after the other, which needs no GPU; nothing is executed. Judged are the decoder's blocks, a
layer each, so wide that the kernels of three phases are below a tenth of the weights: stored twice, those would be far above the bound.
A scheme that a card has no kernels for is refused by `plan`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import RESULTS, save, workplace
from benchmarks._models import CLIP_TINY_336, VICUNA_7B, write_llava
from benchmarks.engine_sizes import BOUND, weights_read
from tmc_export.core.errors import LegalityError

CARDS = {"SM86": ("rtx-a2000-laptop", "8.6"), "SM89": ("rtx-4090", "8.9"), "SM120": ("rtx-5090", "12.0")}
"""Capability → a device of it, and its number in a recipe."""
LAYERS, PHASES, LINEARS = 2, 3, 4
"""Of the model; prefill, chunk and decode; products of a layer: query with key and value, output, gate with up, down."""
SAMPLES = 2
DECODER = {
    **VICUNA_7B, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8,
    "num_hidden_layers": LAYERS, "vocab_size": 2048, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A row of the matrix.

    Attributes:
        parts: the recipe's `quantize`, without its calibration.
        sees: the type of the weights in the builder's log.
        stored: whether the engine holds them in that type; otherwise the builder widens them before it stores them.
        dtype: of the recipe.
        products: of a layer, that read the codes themselves at least; before the others a kernel widens them.
        calibrated: the scheme is found on data.
        bound: the most that an engine's bytes may be of its weights.
    """

    parts: dict[str, dict[str, object]]
    sees: str
    dtype: str = "float16"
    products: int = 2
    calibrated: bool = False
    bound: float = BOUND
    stored: bool = True


def _decoder(sees: str, dtype: str = "float16", products: int = 2, **part: object) -> Scheme:
    data = "activations" in part or "algorithm" in part
    return Scheme({"decoder": part}, sees, dtype, products, data)


def _widened(sees: str, weights: str) -> Scheme:
    """16 bits beside float32, which an engine holds as float32: twice the bytes that the graph reads, and once."""
    return replace(_decoder(sees, "float32", 0, weights=weights), bound=2 * BOUND, stored=False)


SCHEMES = {
    "float16": Scheme({}, "Half", products=0),
    "fp16 beside float32": _widened("Half", "fp16"),
    "bf16 beside float32": _widened("BFloat16", "bf16"),
    "int8": _decoder("Int8", weights="int8"),
    "int8 w8a8 smooth": _decoder("Int8", products=4, weights="int8", activations="int8", smooth=0.5),
    "int4 rtn": _decoder("Int4", weights="int4", block=32),
    "int4 awq": _decoder("Int4", weights="int4", block=128, algorithm="awq"),
    "int4 gptq": _decoder("Int4", weights="int4", block=128, algorithm="gptq"),
    "fp8": _decoder("FP8", weights="fp8"),
    "fp8 w8a8": _decoder("FP8", products=4, weights="fp8", activations="fp8"),
    "nvfp4": _decoder("FP4E2M1", products=0, weights="nvfp4"),
    "nvfp4 w4a4": replace(_decoder("FP4E2M1", products=4, weights="nvfp4", activations="nvfp4"), bound=1.15),
    "int8 slots": Scheme({"kv": {"weights": "int8"}}, "Half", products=0, calibrated=True),
    "fp8 slots": Scheme({"kv": {"weights": "fp8"}}, "Half", products=0, calibrated=True),
}
"""Name → scheme.

Kernels of nvfp4 w4a4 are larger than the others; an output projection alone, the smallest of a layer, stored twice would be 0.09 more.
"""


def slug(name: str) -> str:
    """A scheme's name in file names and recipes."""
    return name.replace(" ", "-")


def write_data(base: Path) -> dict[str, Any]:
    """Write pictures and questions to calibrate on; returns the recipe's `calibration`."""
    import numpy as np
    from PIL import Image

    folder = base / "calibration"
    folder.mkdir(exist_ok=True)
    for number in range(SAMPLES):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (336, 336, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "prompts.jsonl").write_text('{"prompt": "what is there"}\n' * SAMPLES, "utf-8")
    return {"images": str(folder), "prompts": str(folder / "prompts.jsonl"), "samples": SAMPLES}


def write_recipe(base: Path, name: str, card: str, *others: str) -> Path:
    """Write the recipe of a scheme for a card, and for cards besides; a key a line, so that a refusal's line says which it is of."""
    scheme = SCHEMES[name]
    quantize: dict[str, Any] = {**scheme.parts, **({"calibration": write_data(base)} if scheme.calibrated else {})}
    target = {"device": CARDS[card][0], "runtime": "tensorrt-rtx", "compute_capabilities": [CARDS[c][1] for c in (*others, card)]}
    lines = [
        "recipe: 1", f"name: {slug(name)}", f"model: {json.dumps({'source': str(base / 'model'), 'dtype': scheme.dtype})}",
        "inputs: {images: 1, text_tokens: 64, new_tokens: 64}",
        "compress: [{at: decoder.1, method: fastv, keep: 25%}]",
        *([f"quantize: {json.dumps(quantize)}"] if quantize else []),
        f"target: {json.dumps(target)}",
    ]  # fmt: skip
    path = base / f"{slug(name)}-{card}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refused(recipe: Path) -> str | None:
    """Return what `plan` says of a recipe that it refuses; None of one that it takes."""
    from tmc_export.plan.make import make_plan
    from tmc_export.plan.source import read_model_files
    from tmc_export.recipe import load_recipe

    loaded = load_recipe(recipe)
    try:
        make_plan(loaded, read_model_files(recipe.parent / "model"))
    except LegalityError as error:
        return str(error).removeprefix(f"{recipe.parent}/")
    return None


def is_product(kind: str, name: str) -> bool:
    """Whether a layer of the log is a matrix product: a kernel of it alone, or one that the weight's widening is fused into.

    >>> is_product("gemm", "node_MatMul_4_myl0_1"), is_product("runtime_fusion", "__myl_MulFc_myl0_2")
    (True, True)
    >>> is_product("kgen", "__myl_CastMulCast_myl0_3")
    False
    """
    return kind == "gemm" or (kind == "runtime_fusion" and name.split("_myl")[1].endswith("Fc"))


def measure(base: Path, name: str) -> list[dict[str, Any]]:
    """Build a scheme's bundle, and its engines for each card that it is legal on; one entry per card."""
    from tmc_export.api.bundling import build_bundle
    from tmc_export.engine import EngineOptions, build_engines

    says = {card: refused(write_recipe(base, name, card)) for card in CARDS}
    legal = [card for card in CARDS if says[card] is None]
    found: list[dict[str, Any]] = [{"scheme": name, "card": card, "refused": text} for card, text in says.items() if text is not None]
    began = time.perf_counter()
    recipe = write_recipe(base, name, legal[-1], *legal[:-1])
    folder = build_bundle(recipe, base / name.replace(" ", "-"), record=False, engines=False).folder
    bundle = time.perf_counter() - began
    for card in legal:
        reports = build_engines(folder, EngineOptions(capabilities=(card,)), force=True)
        blocks = [r for r in reports if r.name.startswith("block_")]
        graphs = {r.name: folder / "engines" / f"{r.name}.onnx" for r in blocks}
        layers = [layer for r in blocks for layer in r.layers]
        readers = [layer for layer in layers if SCHEMES[name].sees in layer.constants]
        found.append({
            "scheme": name, "card": card, "version": reports[0].version, "bundle_seconds": bundle,
            "engines": {r.name: {"bytes": r.size, "seconds": r.seconds, "peak_rss": r.peak_rss} for r in reports},
            "block_weights_bytes": {n: weights_read(path) for n, path in graphs.items()},
            "readers": len(readers), "products": sum(is_product(layer.kind, layer.name) for layer in readers),
            "kinds": sorted({f"{layer.kind} {re.sub('[0-9]+', '', layer.name)}" for layer in readers}),
            "fused_attention": sum(r.multi_head_attention for r in blocks),
        })  # fmt: skip
        print(f"  {name}, {card}: {_figure(found[-1])}", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return found


def _ratios(entry: dict[str, Any]) -> list[float]:
    return [entry["engines"][name]["bytes"] / weights for name, weights in entry["block_weights_bytes"].items()]


def _figure(entry: dict[str, Any]) -> str:
    engines, weights = entry["engines"], sum(entry["block_weights_bytes"].values())
    blocks = sum(engines[name]["bytes"] for name in entry["block_weights_bytes"])
    seconds, peak = sum(e["seconds"] for e in engines.values()), max(e["peak_rss"] for e in engines.values())
    return (
        f"{blocks / 1e6:.1f} MB for {weights / 1e6:.1f} MB of weights ({', '.join(f'{r:.3f}' for r in _ratios(entry))}); "
        f"{entry['readers']} kernels read {SCHEMES[entry['scheme']].sees}, {entry['products']} of them products; "
        f"attention fused {entry['fused_attention']} times; {seconds:.0f} s, {peak / 2**30:.1f} GiB"
    )


def row_of(entry: dict[str, Any]) -> dict[str, object]:
    """The row of the table, with its bounds: weights once, every product's weight in codes, attention fused in each layer and phase."""
    scheme, what = SCHEMES[entry["scheme"]], f"{entry['scheme']}, {entry['card']}"
    if "refused" in entry:
        place, _, why = entry["refused"].partition(": ")
        named = re.fullmatch(r".*\.yaml:\d+:\d+", place) is not None
        return {"what": what, "figure": f"refused: {why}", "bound": "by `plan`, at the recipe's line", "ok": named}
    least = PHASES * LAYERS * LINEARS if scheme.stored else 0
    products = PHASES * LAYERS * scheme.products
    fused = PHASES * LAYERS if scheme.dtype == "float16" else 0
    counted = ((entry["readers"], least), (entry["products"], products), (entry["fused_attention"], fused))
    ok = max(_ratios(entry)) <= scheme.bound and all(found >= wanted for found, wanted in counted)
    bound = f"≤ {scheme.bound}; ≥ {least}; ≥ {products}; ≥ {fused}"
    return {"what": what, "figure": _figure(entry), "bound": bound, "ok": ok}


def recorded() -> dict[str, list[dict[str, Any]]]:
    """Scheme → its entries in the result file as it is."""
    path = RESULTS / "engine_matrix.json"
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(path.read_text("utf-8"))["raw"]["engines"] if path.exists() else []:
        found.setdefault(entry["scheme"], []).append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="a folder for the model and what was measured, that stays; what is there is not measured again")
    parser.add_argument("schemes", nargs="*", metavar="SCHEME", help=f"of: {', '.join(SCHEMES)}; absent: all. The others' rows stay")
    options = parser.parse_args()
    if unknown := sorted(set(options.schemes) - SCHEMES.keys()):
        raise SystemExit(f"unknown scheme {', '.join(unknown)}; choose of: {', '.join(SCHEMES)}")
    found = recorded()
    with workplace(6 << 30, options.keep) as base:
        if not (base / "model").exists():
            write_llava(base / "model", DECODER, CLIP_TINY_336, dtype="float16")
        for name in options.schemes or SCHEMES:
            kept = base / f"{slug(name)}.json"
            if not kept.exists():
                kept.write_text(json.dumps(measure(base, name)), encoding="utf-8")
            found[name] = json.loads(kept.read_text("utf-8"))
    raw = [entry for name in SCHEMES for entry in found.get(name, ())]
    rows = [row_of(entry) for entry in raw] + [{"what": name, "figure": "*not run*"} for name in SCHEMES if name not in found]
    version = next(e["version"] for e in raw if "version" in e)
    what = (
        f"TensorRT-RTX {version} engines of a decoder's blocks ({LAYERS} layers of Llama-3.2-3B's shape, fastv between them) under "
        "every scheme: bytes against the weights that the graphs read (by block); kernels in the log that read stored weights "
        "of the scheme's type, and products of codes among them (before the others a kernel widens the weights); fused attention "
        f"over {LAYERS} layers and {PHASES} phases (beside float32 it is never fused, and engines hold weights of 16 bits as float32); "
        "build time and peak memory of all subgraphs. Built, not executed."
    )
    print(save("engine_matrix", {"what": what, "rows": rows, "raw": {"engines": raw}}))
    if bad := [str(row["what"]) for row in rows if row.get("ok") is False]:
        raise SystemExit(f"engine_matrix: a bound is not met for {'; '.join(bad)}; see benchmarks/README.md")


if __name__ == "__main__":
    main()
