"""What a killed build does not do again: a build is killed at several points and started again.

    python benchmarks/resume.py [--keep DIR]

A LLaVA with a tiny tower and the decoder of 0.36 billion weights, random, built for onnxruntime with the decoder in int4.
Undisturbed, then killed (SIGKILL) when the decoder's second block begins, when half of that block's weights are written, and when all is
made; each build that goes on is compared with the undisturbed one, byte by byte. Times are processor time of the process, imports
included, because what else runs on the machine would be in the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import REPOSITORY, save, workplace
from benchmarks._models import CLIP_TINY_336, QWEN2_036B, write_llava


@dataclass(frozen=True)
class Built:
    """One process: its processor time in seconds, what it said, and whether it was killed."""

    seconds: float
    lines: list[str]
    killed: bool


def write_recipe(base: Path) -> Path:
    """Write the recipe beside the model."""
    recipe = {
        "recipe": 1, "name": "resume", "model": {"source": str(base / "model"), "dtype": "float32"},
        "inputs": {"images": 1, "image_size": [336, 336], "text_tokens": 128, "new_tokens": 64},
        "compress": [{"at": "decoder.2", "method": "fastv", "keep": "50%"}],
        "quantize": {"decoder": {"weights": "int4", "block": 32}},
        "target": {"device": "cpu", "runtime": "onnxruntime"},
    }  # fmt: skip
    path = base / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def build(recipe: Path, out: Path, until: Callable[[list[str], Path | None], bool] | None = None) -> Built:
    """Build; kill the build when `until` says so, which is asked with its lines so far and the folder that it works in."""
    log = out.with_suffix(".log")
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "_build.py"), str(recipe), str(out)]
    killed = False
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            work = next(iter(out.parent.glob(f".{out.name}.*.part")), None)
            if not killed and until is not None and until(log.read_text("utf-8").splitlines(), work):
                process.kill()
                killed = True
            time.sleep(0.02)
        _, status, usage = found
        process.returncode = status
    if not killed and status:
        raise SystemExit(f"resume: the build failed:\n{log.read_text('utf-8')}")
    return Built(usage.ru_utime + usage.ru_stime, log.read_text("utf-8").splitlines(), killed)


def same(one: Path, other: Path) -> bool:
    """Compare two bundles, byte by byte."""
    files = [{p.relative_to(b): p for p in b.rglob("*") if p.is_file()} for b in (one, other)]
    return files[0].keys() == files[1].keys() and all(p.read_bytes() == files[1][n].read_bytes() for n, p in files[0].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="a folder for the model that stays; the bundles never do")
    options = parser.parse_args()
    with workplace(12 * 10**9, options.keep) as base:
        if not (base / "model").exists():
            write_llava(base / "model", QWEN2_036B, CLIP_TINY_336, dtype="float32")
        recipe, whole = write_recipe(base), base / "whole"
        began = time.perf_counter()
        first = build(recipe, whole)
        wall = time.perf_counter() - began
        weights = (whole / "onnx" / "block_1.data").stat().st_size
        points: dict[str, Callable[[list[str], Path | None], bool]] = {
            "when block_1 begins": lambda lines, work: "export block_1" in lines,
            "half of block_1's weights written": lambda lines, work: size(work) > weights / 2,
            "when all is made": lambda lines, work: "hash files" in lines,
        }
        rows = [{"what": "undisturbed", "figure": f"{first.seconds:.0f} s of processor time, {wall:.0f} s in all"}]
        raw: dict[str, float] = {"undisturbed": first.seconds, "undisturbed_wall": wall}
        fine = True
        for name, until in points.items():
            out = base / "out"
            killed, again = build(recipe, out, until), build(recipe, out)
            equal = killed.killed and same(whole, out)
            fine &= equal
            raw |= {f"{name}: killed after": killed.seconds, f"{name}: goes on": again.seconds}
            figure = f"killed after {killed.seconds:.0f} s; the next build takes {again.seconds:.0f} s"
            rows.append({"what": name, "figure": figure, "bound": "the same bytes", "ok": equal})
            shutil.rmtree(out)
        shutil.rmtree(whole)
    what = "A build of a 0.36B decoder (int4), killed and started again. Seconds of processor time, imports included."
    print(save("resume", {"what": what, "rows": rows, "raw": raw}))
    if not fine:
        raise SystemExit("resume: a build that went on has other bytes")


def size(work: Path | None) -> int:
    """Bytes of the second block's weights so far."""
    path = work / "onnx" / "block_1.data" if work is not None else None
    return path.stat().st_size if path is not None and path.is_file() else 0


if __name__ == "__main__":
    main()
