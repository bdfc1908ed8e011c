"""Times prefills and selectors in one process, in turns.

    python -m benchmarks._selector_worker FOLDER --rounds 7 --prefill 576=BUNDLE 2880=BUNDLE --selectors fastv-576 dart-2880

A round runs every prefill once and every graph of FOLDER three times, a pair whose difference counts in turns and six times; every other
round goes the other way. Nothing of the first run of each counts. Prints one JSON object: name → per round, milliseconds of each run.
Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks._map_sums import BARE, SUMMED
from tmc_export.bundle.read import open_manifest
from tmc_export.runtime._backend import open_backend, options_for
from tmc_export.runtime._decoder import Decoder

_TIMES = 3


def prefill(bundle: Path) -> Callable[[], object]:
    """Open a bundle; a call takes a whole prompt, token table included."""
    program = open_manifest(bundle).program
    decoder = Decoder(program, open_backend("onnxruntime", bundle, options_for(program)))
    count = program.blocks[0].tokens
    ids = np.random.default_rng(0).integers(300, program.vocabulary - 1, count)  # values do not change the work
    positions = np.broadcast_to(np.arange(count), (program.rope_axes, count))
    group = np.zeros(count, np.int64)

    def run() -> object:
        decoder.reset()
        return decoder.turn(decoder.embed(ids), positions, group, count, "whole")

    return run


def selector(path: Path) -> Callable[[], object]:
    """Open a graph; a call runs it on the inputs beside it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as in a bundle
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with np.load(path.with_suffix(".npz")) as saved:
        feed: dict[str, Any] = {i.name: saved[i.name] for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return partial(session.run, names, feed)


def together(names: list[str]) -> list[list[str]]:
    """Names in their order, those of one pair side by side."""
    groups: dict[str, list[str]] = {}
    for name in names:
        kind = next((kind for kind in (SUMMED, BARE) if name.endswith(kind)), None)
        groups.setdefault(name if kind is None else name.removesuffix(kind), []).append(name)
    return list(groups.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", nargs="+", required=True)
    parser.add_argument("--selectors", nargs="+", required=True)
    options = parser.parse_args()
    what: dict[str, Callable[[], object]] = {}
    for pair in options.prefill:
        size, _, bundle = pair.partition("=")
        what[size] = prefill(Path(bundle))
    what |= {name: selector(options.folder / f"{name}.onnx") for name in options.selectors}
    found: dict[str, list[list[float]]] = {name: [] for name in what}
    for number in range(options.rounds + 1):
        names = list(what) if number % 2 else list(what)[::-1]
        for group in together(names):
            times: dict[str, list[float]] = {name: [] for name in group}
            for _ in range(_TIMES * len(group) if group[0] in options.selectors else 1):
                for name in group:
                    began = time.perf_counter()
                    what[name]()
                    times[name].append((time.perf_counter() - began) * 1e3)
            for name in group if number else ():
                found[name].append(times[name])
        print(f"  round {number}/{options.rounds}", file=sys.stderr, flush=True)
    if "torch" in sys.modules:
        raise SystemExit("the timing process imported torch")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
