"""What a selector costs: every method that selects or merges, alone, as a share of the 0.36B decoder's prefill.

    python benchmarks/selector_share.py [--rounds 7] [--keep DIR]
    python benchmarks/selector_share.py --only fastv divprune --rounds 3

A selector is every stage of a method with the scores it asks for, as one onnxruntime graph at real sizes (`_selector.py`): pictures of 24
x 24 patches, 1024 wide in the encoder and 896 in the decoder; prompts of 576 visual tokens and of 2880 (LLaVA-NeXT's five crops), and 64
of text. About a quarter of the visual tokens stays. Methods before the decoder run once a picture: at 2880 five times, which is what their
time is then; of methods of many stages (ToMe: 23) four are timed and stand for all. Sums over all rows of a layer's map, which the block
before a cut makes, cost what that layer's attention takes more with them than without (`_map_sums.py`). The share is of the uncompressed
prefill (fp32, same threads), measured in the same rounds of the same process; the second share is of the compressed prefill, reckoned as
the uncompressed one times the FLOPs that remain, selector added. What is before the decoder's prefill (vision tower, TRIM's text tower) is
in neither.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import REPOSITORY, run_json, save, spread, workplace
from benchmarks._decoder036b import build, flops
from benchmarks._map_sums import BARE, SUMMED
from benchmarks._selector_cases import CASES, LARGE, PATCHES, TEXT

BOUND = 0.02


def prefills(base: Path) -> dict[int, Path]:
    """Build the uncompressed decoder for one picture and for five."""
    inputs = {"text_tokens": TEXT, "new_tokens": TEXT}
    return {
        PATCHES: build(base, "uncompressed", [], inputs={"images": 1, **inputs}),
        LARGE: build(base, "uncompressed_2880", [], inputs={"images": LARGE // PATCHES, **inputs}),
    }


def selectors(base: Path, names: list[str]) -> list[dict[str, Any]]:
    """Write the selectors' graphs in two processes of their own (the timing must not share one with torch); what each is."""
    folder = base / "selectors"
    folder.mkdir(exist_ok=True)
    chosen = names or list(CASES)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-m", "benchmarks._selector", str(folder), *part] for part in (chosen[::2], chosen[1::2]) if part]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env=env) for command in commands]
    found: list[dict[str, Any]] = []
    for command, process in zip(commands, running, strict=True):
        out, _ = process.communicate()
        if process.returncode:
            for other in running:
                other.kill()
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        found += [json.loads(line) for line in out.decode().splitlines()]
    return sorted(found, key=lambda said: (list(CASES).index(said["name"]), said["visual"]))


def graph_of(said: dict[str, Any]) -> str:
    """Name of the graph that serves an entry: that of one picture where it runs several times."""
    return f"{said['name']}-{PATCHES if said['repeats'] > 1 else said['visual']}"


def row(said: dict[str, Any], times: dict[str, list[list[float]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One method at one size: the row of the table, and the figures behind it."""
    name, visual = said["name"], int(said["visual"])
    mine = [statistics.median(runs) for runs in times[graph_of(said)]]
    if said["maps"]:
        pair = zip(times[f"{graph_of(said)}-{SUMMED}"], times[f"{graph_of(said)}-{BARE}"], strict=True)
        adding = [statistics.median(x - y for x, y in zip(a, b, strict=True)) for a, b in pair]
        mine = [a + b for a, b in zip(mine, adding, strict=True)]
    mine = [time * said["times"] for time in mine]
    whole = [runs[0] for runs in times[str(visual)]]
    share = spread([a / b for a, b in zip(mine, whole, strict=True)])
    count = len(said["layers"])
    left = flops(Counter(tokens + TEXT for tokens in said["layers"])) / flops({visual + TEXT: count})
    compressed = spread([a / (b * left + a) for a, b in zip(mine, whole, strict=True)])
    reason = CASES[name].above.get(visual, "")
    within = share["median"] <= BOUND
    figures = {
        "selector_ms": spread(mine), "prefill_ms": spread(whole), "share": share, "flops_left": left, "share_of_compressed": compressed,
        "stages": said["stages"], "times": said["times"], "mean_tokens": sum(said["layers"]) / count,
    }  # fmt: skip
    made = {
        "what": f"{name}, {visual} visual tokens ({said['stages']} stages, {CASES[name].at})",
        "figure": f"{100 * share['median']:.2f} % ({100 * share['min']:.2f}..{100 * share['max']:.2f}), "
        f"{figures['selector_ms']['median']:.1f} ms; {100 * compressed['median']:.1f} % of the compressed prefill",
        "bound": f"≤ {100 * BOUND:.0f} %" if not reason or within else f"above {100 * BOUND:.0f} %: {reason}",
        "ok": within if not reason or within else None,
    }
    return made, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", help="a folder for model, bundles and graphs that stays")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=[], help="these methods only; nothing is written")
    options = parser.parse_args()
    with workplace(8 << 30, options.keep) as base:
        bundles = prefills(base)
        entries = selectors(base, options.only)
        names = sorted({graph_of(said) for said in entries})
        names += sorted({f"{graph_of(said)}-{kind}" for said in entries if said["maps"] for kind in (SUMMED, BARE)})
        command = [sys.executable, "-m", "benchmarks._selector_worker", str(base / "selectors"), "--rounds", str(options.rounds)]
        command += ["--prefill", *(f"{size}={path}" for size, path in bundles.items()), "--selectors", *names]
        times: dict[str, list[list[float]]] = run_json(command)
    rows: list[dict[str, Any]] = []
    for size in bundles:
        found = spread([runs[0] for runs in times[str(size)]])
        figure = f"{found['median']:.0f} ms ({found['min']:.0f}..{found['max']:.0f})"
        rows.append({"what": f"uncompressed prefill, {size} visual tokens and {TEXT} of text", "figure": figure})
    raw = {}
    for said in entries:
        made, raw[f"{said['name']}-{said['visual']}"] = row(said, times)
        rows.append(made)
    for made in rows:
        state = {True: "met", False: "NOT MET", None: ""}[made.get("ok")]
        print(f"{made['what']}: {made['figure']}  {made.get('bound', '')} {state}", flush=True)
    if not options.only:
        what = (
            "Share of the 0.36B decoder's uncompressed prefill (fp32) that each method's selector takes, scores included; a quarter of the "
            f"visual tokens stays. Methods before the decoder run once a picture, {LARGE // PATCHES} times at {LARGE}."
        )
        print(save("selector_share", {"what": what, "rounds": options.rounds, "rows": rows, "raw": raw}))


if __name__ == "__main__":
    main()
