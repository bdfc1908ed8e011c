"""From recipe to engines at 7B: int4 within 20 GB of memory, the same within 8 GB, and the plan for a board of 8 GB.

    python benchmarks/llava7b_engines.py [--keep DIR] [--layers N] [--machine '20 GB']

Writes a model of LLaVA-1.5-7B's true configuration with random fp16 weights as safetensors shards, 14 GB; builds the recipe
`recipes/llava-1.5-7b-fastv-int4.yaml` for a desktop GPU (TensorRT-RTX, SM89, which needs no GPU), engines included: once for a machine of
20 GB (`target.build_memory_gib`), once for one of 8, where the planner cuts the decoder into more blocks. Each build is a process of its
own; its memory is watched from outside, together with that of the processes that build the engines. Nothing is executed. Then the recipe is
planned for a board of 8 GB that builds its own engines, and in float16, which cannot work there. Needs 32 GB of disk, which it gives back.

Resident memory counts pages of mapped files, which the kernel may drop at any time, and what two processes share twice: the bounds hold for
the strictest sum. `--layers` is for trying the script; it writes no result.
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

from benchmarks._common import REPOSITORY, save, workplace
from benchmarks._models import CLIP_LARGE_336, VICUNA_7B, write_llava
from benchmarks._tree import run_json_in_tree
from tmc_export.core.errors import LegalityError
from tmc_export.engine.bundle import read_engines
from tmc_export.plan.make import device_settings, report_plan
from tmc_export.plan.memory import GIB, gib
from tmc_export.plan.source import read_model_files
from tmc_export.recipe import load_recipe

RECIPE = REPOSITORY / "recipes" / "llava-1.5-7b-fastv-int4.yaml"
BOUNDS = {"20 GB": 20e9, "8 GB": 8e9}
"""Memory of the machine that builds; the second is below 8 GiB, which such machines have."""
BOARD = "jetson-orin-nano-8gb"


def build(base: Path, memory: float) -> dict[str, Any]:
    """Build the recipe for a machine of so much memory (bytes); what it took, and what came out."""
    settings = [f"model.source={base / 'model'}", *device_settings("rtx-4090"), f"target.build_memory_gib={memory / GIB:.2f}"]
    out = base / "bundle"
    try:
        command = [sys.executable, "-m", "benchmarks._build", str(RECIPE), str(out), *settings, "--engines"]
        said, used = run_json_in_tree(command, {"TMC_EXPORT_CACHE_GIB": "0"})
        return {**used, "steps": _seconds(said["steps"]), "engines": _engines(out), "splits": _planned(out)["splits"]}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _seconds(steps: list[tuple[float, str]]) -> dict[str, float]:
    """Seconds of each step: from its line to the next one's."""
    found: dict[str, float] = {}
    for (start, name), (end, _) in zip(steps, steps[1:], strict=False):
        kind = name.split(" for ")[0]
        found[kind] = found.get(kind, 0.0) + end - start
    return found


def _planned(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "report" / "plan.json").read_text("utf-8"))
    return found


def _engines(bundle: Path) -> list[dict[str, Any]]:
    """Size, weights, and peak of the building process: as it was, and as the plan reckoned it."""
    from benchmarks.engine_sizes import weights_read

    graphs = {p["name"]: bundle / p["onnx"] for p in json.loads((bundle / "engines" / "profiles.json").read_text("utf-8"))["subgraphs"]}
    reckoned = {e["name"]: e["peak"] for e in _planned(bundle)["memory"]["build"]}
    found = []
    for record in read_engines(bundle):
        report = json.loads((bundle / f"{record.file}.layers.json").read_text("utf-8"))
        sizes = {"engine_bytes": record.bytes, "weights_bytes": weights_read(graphs[record.name])}
        peaks = {"peak_bytes": report["peak_rss"], "reckoned_peak_bytes": reckoned.get(record.name)}
        found.append({"engine": record.name, "version": record.version, "seconds": report["seconds"], **sizes, **peaks})
    return found


def plan_for_board(base: Path, *overrides: str) -> dict[str, Any]:
    """Plan the recipe for the board; what it comes to, or why it is refused."""
    recipe = load_recipe(RECIPE, (f"model.source={base / 'model'}", *device_settings(BOARD), *overrides))
    try:
        report = report_plan(recipe, read_model_files(base / "model"))
    except LegalityError as error:
        return {"refused": str(error).partition(": ")[2]}
    assert report.room is not None
    return {
        "splits": list(report.splits), "blocks": [[b.first, b.last] for b in report.plan.blocks], "free_bytes": report.room.free,
        "build_bytes": max(e.peak for e in report.build), "run_bytes": report.run.total,
    }  # fmt: skip


def rows_of(builds: dict[str, dict[str, Any]], board: dict[str, Any], refused: dict[str, Any]) -> list[dict[str, Any]]:
    """The table."""
    rows: list[dict[str, Any]] = []
    for name, found in builds.items():
        blocks = [e for e in found["engines"] if e["engine"].startswith("block")]
        bound = BOUNDS[name]
        rows.append({
            "what": f"machine of {name}: peak resident memory of all processes, mapped files included; {len(blocks)} blocks",
            "figure": f"{found['rss_mib'] * 2**20 / 1e9:.2f} GB (shared pages once: {found['pss_mib'] * 2**20 / 1e9:.2f})",
            "bound": f"≤ {name}", "ok": found["rss_mib"] * 2**20 <= bound,
        })  # fmt: skip
        export = sum(s for step, s in found["steps"].items() if step.startswith("export"))
        engines = sum(e["seconds"] for e in found["engines"])
        parts = f"export {export:.0f} s, engines {engines:.0f} s, hashing and the rest {found['seconds'] - export - engines:.0f} s"
        rows.append({"what": f"machine of {name}: time of the whole build", "figure": f"{found['seconds']:.0f} s: {parts}"})
        total = sum(e["engine_bytes"] for e in found["engines"]), sum(e["weights_bytes"] for e in found["engines"])
        rows.append({
            "what": f"machine of {name}: engines ÷ weights that their graphs read",
            "figure": f"{total[0] / 1e9:.2f} GB ÷ {total[1] / 1e9:.2f} GB = {total[0] / total[1]:.3f}", "bound": "≤ 1.1",
            "ok": total[0] <= 1.1 * total[1],
        })  # fmt: skip
        for e in (e for e in found["engines"] if e["weights_bytes"] >= 10**8):
            rows.append({
                "what": f"machine of {name}: peak of building {e['engine']} ({gib(e['weights_bytes'])} of weights), beside the plan's",
                "figure": f"{gib(e['peak_bytes'])}, reckoned {gib(e['reckoned_peak_bytes'])}",
                "bound": "≤ reckoned × 1.1", "ok": e["peak_bytes"] <= 1.1 * e["reckoned_peak_bytes"],
            })  # fmt: skip
    text = f"cut into blocks {', '.join(f'{a}–{b - 1}' for a, b in board['blocks'])}; up to {gib(board['build_bytes'])} to build and "
    text += f"{gib(board['run_bytes'])} to run, of {gib(board['free_bytes'])}"
    fits = max(board["build_bytes"], board["run_bytes"]) <= board["free_bytes"]
    rows.append({"what": f"plan for {BOARD}, int4 (reckoned, not run)", "figure": text, "bound": "fits", "ok": fits})
    why = refused.get("refused")
    rows.append({"what": f"plan for {BOARD}, float16", "figure": f"refused: {why}", "bound": "refused", "ok": why is not None})
    return rows


def what_of(version: str) -> str:
    """What was built."""
    return (
        "LLaVA-1.5-7B's configuration, random weights: pool at the projector, fastv after layer 2, decoder in int4 (blocks of 128), from "
        f"recipe to TensorRT-RTX {version} engines for SM89. Built, not executed."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="a folder for the model that stays; the bundles never do")
    parser.add_argument("--layers", type=int, help="decoder layers, to try the script; no result is written")
    parser.add_argument("--machine", action="append", choices=list(BOUNDS), help="build for this machine only")
    options = parser.parse_args()
    with workplace(32 * 10**9, options.keep) as base:
        began = time.perf_counter()
        if not (base / "model").exists():
            text = VICUNA_7B if options.layers is None else {**VICUNA_7B, "num_hidden_layers": options.layers}
            write_llava(base / "model", text, CLIP_LARGE_336, dtype="float16")
        written = time.perf_counter() - began
        weights = sum(p.stat().st_size for p in (base / "model").glob("*.safetensors"))
        board, refused = plan_for_board(base), plan_for_board(base, "quantize={}")
        builds: dict[str, dict[str, Any]] = {}
        for name in options.machine or BOUNDS:
            builds[name] = build(base, BOUNDS[name])
            rows = [{"what": "weights of the checkpoint, float16", "figure": f"{weights / 1e9:.2f} GB"}, *rows_of(builds, board, refused)]
            raw = {"builds": builds, "board": board, "board_float16": refused, "weights_bytes": weights, "write_model_seconds": written}
            if options.layers is None:
                print(save("llava7b_engines", {"what": what_of(builds[name]["engines"][0]["version"]), "rows": rows, "raw": raw}))
            else:
                print(json.dumps([builds[name], rows], indent=1))
    if options.layers is None and any(row.get("ok") is False for row in rows):
        raise SystemExit("llava7b_engines: a bound is not met; see benchmarks/README.md")


if __name__ == "__main__":
    main()
