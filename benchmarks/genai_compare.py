"""tmc-export's uncompressed decoder against onnxruntime-genai's graphs of the same weights.

    python benchmarks/genai_compare.py [--rounds 7] [--keep DIR]

The decoder of `_decoder036b.py`, 640-token prompt. onnxruntime-genai is installed into an environment of its own, which sees the
packages of this one (the same onnxruntime library); its `models.builder` makes graphs of a local folder: fp32 as it makes it by itself,
whose head answers every row of the prompt; `last-row`, fp32 with `prune_lm_head`, which answers the last row, as ours does; and int4
(block 32, symmetric, accuracy levels 4 and 1, last row, head in fp32, as ours). Both runtimes get the same number of threads (left alone,
onnxruntime-genai took one). Every measurement is a process of its own; they take turns.

Ours includes the token table in a prefill, and writing the KV slots; theirs what `append_tokens` does. A token is one step of greedy
search. The int4 decode rows are closest to their bounds, and the machine's speed differs more between two processes than they do: there
both processes are alive at once and take turns of some tokens (`_token_turns.py`), in rounds of new processes; a round's ratio is the
median of its turns'. Behind a ratio's median stand the order statistics that hold it with 95 %.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import alternate, median_interval, paired, run_json, save, spread, workplace
from benchmarks._decoder036b import build, measure, worker
from benchmarks._models import QWEN2_036B, write_causal_lm
from benchmarks._token_turns import take_token_turns

TOKENS = 48
TURNS = 50
"""Of `PER_TURN` tokens each, in a round; the bundle has room for twelve behind the prompt, to whose end both sides then go back."""
BOUNDS = {"prefill fp32": 1.0, "decode int4 level 4": 1.0, "decode int4 level 1": 1.0}
INT4 = {"decoder": {"weights": "int4", "block": 32}}


def environment(base: Path) -> Path:
    """Make the environment with onnxruntime-genai, unless it is there; returns its Python."""
    folder = base / "genai-env"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True)
        site = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], stdout=subprocess.PIPE, check=True
        )
        Path(site.stdout.decode().strip(), "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "onnxruntime-genai"], check=True, stdout=sys.stderr)
        (folder / "done").touch()
    return python


def build_theirs(python: Path, base: Path, name: str, precision: str, options: list[str]) -> Path:
    """Run onnxruntime-genai's model builder, unless its result is there."""
    out = base / f"genai-{name}"
    if not (out / "genai_config.json").is_file():
        flags = ["-i", str(base / "lm"), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(base / "cache")]
        command = [str(python), "-m", "onnxruntime_genai.models.builder", *flags, *(["--extra_options", *options] if options else [])]
        with (base / f"{name}.log").open("wb") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return out


def their_worker(python: Path, folder: Path, prefills: int, threads: int, *more: str) -> list[str]:
    """The command that times one of their graphs."""
    worker = str(Path(__file__).with_name("_genai_worker.py"))
    return [str(python), worker, str(folder), "--prefills", str(prefills), "--threads", str(threads), *more]


def theirs(python: Path, folder: Path, prefills: int, tokens: int, threads: int) -> dict[str, Any]:
    """Time one of their graphs once."""
    return run_json(their_worker(python, folder, prefills, threads, "--tokens", str(tokens)))


def prepare(base: Path, threads: int) -> tuple[dict[str, Any], dict[int, dict[str, list[str]]]]:
    """Make models, bundles and graphs; returns the measurements by name, and by accuracy level the processes that decode in turn."""
    if not (base / "lm").exists():
        write_causal_lm(base / "lm", QWEN2_036B)
    python = environment(base)
    ours32, ours4 = build(base, "uncompressed", []), build(base, "uncompressed_int4", [], quantize=INT4)
    theirs32 = build_theirs(python, base, "fp32", "fp32", [])
    last_row = build_theirs(python, base, "fp32-last-row", "fp32", ["prune_lm_head=true"])
    what: dict[str, Any] = {
        "fp32 ours": partial(measure, ours32, 3, TOKENS, threads=threads),
        "fp32 genai": partial(theirs, python, theirs32, 3, TOKENS, threads),
        "fp32 last-row genai": partial(theirs, python, last_row, 3, TOKENS, threads),
    }
    decode: dict[int, dict[str, list[str]]] = {}
    for level in (4, 1):
        options = ["prune_lm_head=true", f"accuracy_level={level}", "block_size=32", "nodes_to_exclude=/lm_head/MatMul"]
        folder = build_theirs(python, base, f"int4-{level}", "int4", options)
        what[f"int4 level {level} ours"] = partial(measure, ours4, 2, 0, level, threads)
        what[f"int4 level {level} genai"] = partial(theirs, python, folder, 2, 0, threads)
        decode[level] = {
            "ours": worker(ours4, 0, 0, level, threads, "--serve"),
            "genai": their_worker(python, folder, 0, threads, "--serve"),
        }
    return what, decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decode-rounds", type=int, default=15, help="rounds of new processes that decode in turn, for the int4 rows")
    parser.add_argument("--keep", help="a folder for models, bundles and the environment that stays")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of both runtimes; by default one per core")
    options = parser.parse_args()
    with workplace(14 << 30, options.keep) as base:
        what_runs, decode_runs = prepare(base, options.threads)
        found = alternate(what_runs, options.rounds)
        decoded = {level: take_token_turns(commands, options.decode_rounds, TURNS) for level, commands in decode_runs.items()}
        code = "import importlib.metadata, json; print(json.dumps({'v': importlib.metadata.version('onnxruntime-genai')}))"
        version = run_json([str(environment(base)), "-c", code])["v"]
    rows: list[dict[str, object]] = []
    raw: dict[str, Any] = {}
    for graphs in ("fp32", "fp32 last-row", "int4 level 4", "int4 level 1"):
        pair = found[f"{graphs.removesuffix(' last-row')} ours"], found[f"{graphs} genai"]
        for kind, key in (("prefill", "prefill_ms"), ("decode", "token_ms")):
            if kind == "decode" and graphs.startswith("int4"):
                ours, others = (decoded[int(graphs[-1])][side] for side in ("ours", "genai"))
                pair = [{key: turns} for turns in ours], [{key: turns} for turns in others]
                ratios = [median(a / b for a, b in zip(*turns, strict=True)) for turns in zip(ours, others, strict=True)]
            else:
                ratios = [median(a[key]) / median(b[key]) for a, b in zip(*pair, strict=True)]
            times = [spread([t for run in runs for t in run[key]]) for runs in pair]
            ratio = {**paired(*pair, key), **spread(ratios)}
            low, high = median_interval(ratios)
            raw[f"{kind} {graphs}"] = {"ours_ms": times[0], "genai_ms": times[1], "ratio": ratio | {"low": low, "high": high}}
            bound = BOUNDS.get(f"{kind} {graphs}")
            figures = [f"{t['median']:.1f} ms ({t['min']:.1f}..{t['max']:.1f})" for t in times]
            rows.append({
                "what": f"{kind}, {graphs}: ours; genai; ratio",
                "figure": f"{figures[0]}; {figures[1]}; {ratio['median']:.3f} ({low:.3f} to {high:.3f}; least {ratio['of_least']:.3f})",
                "bound": "" if bound is None else f"≤ {bound}",
                "ok": None if bound is None else ratio["median"] <= bound,
            })  # fmt: skip
    for name, runs in found.items():
        raw[f"peak_rss_mib {name}"] = spread([r["peak_rss_mib"] for r in runs])
    what = (
        f"Uncompressed decoder of 0.36 billion weights against onnxruntime-genai {version}: the same onnxruntime library, 640-token "
        f"prompt, int4 in blocks of 32, heads in fp32, {options.threads} thread(s) each."
    )
    print(save("genai_compare", {"what": what, "genai": version, "threads": options.threads, "rows": rows, "raw": raw}))


if __name__ == "__main__":
    main()
