"""Times the decoder of one bundle in a process of its own: whole prompts, token table included, then single tokens.

    python -m benchmarks._decoder_worker BUNDLE --prefills 3 --tokens 32 --accuracy 4 [--tight | --no-tight]

Prints one JSON object: `prefill_ms` and `token_ms` (every run), `prompt_tokens`, `peak_rss_mib`. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks._token_turns import serve
from tmc_export.bundle.read import open_manifest
from tmc_export.runtime._backend import open_backend, options_for
from tmc_export.runtime._decoder import Decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--accuracy", type=int, default=4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--serve", action="store_true", help="decode as many tokens as each line of the input says; see `_token_turns.py`")
    parser.add_argument("--tight", action=argparse.BooleanOptionalAction, help="memory_tight; as the bundle says when absent")
    options = parser.parse_args()
    program = open_manifest(options.bundle).program
    if options.tight is not None:
        program = program.model_copy(update={"memory_tight": options.tight})
    backend = open_backend("onnxruntime", options.bundle, options_for(program, options.threads, options.accuracy))
    decoder = Decoder(program, backend)
    decoder.graphs()
    first = program.cut_before(0)
    count = program.blocks[0].tokens if first is None else first.tokens_in
    visual = program.vision[0].tokens
    low, high = (300, 30000) if program.vocabulary > 30000 else (0, program.vocabulary - 1)
    ids = np.random.default_rng(0).integers(low, high, count)  # text rows stand in for pictures: their values do not change the work
    group = np.zeros(count, np.int64)
    group[8 : 8 + visual] = 1
    positions = np.broadcast_to(np.arange(count), (program.rope_axes, count))
    prefill: list[float] = []
    token: list[float] = []
    for number in range(options.prefills + 1):
        decoder.reset()
        began = time.perf_counter()
        trace = decoder.turn(decoder.embed(ids), positions, group, count)
        took = (time.perf_counter() - began) * 1e3
        if number:
            prefill.append(took)
    logits, prompt = trace.logits, decoder.mark()

    def step() -> None:
        nonlocal logits
        logits = decoder.step(int(logits.argmax()), keep=False)

    if options.serve:
        serve(step, decoder.room, lambda: decoder.rewind(prompt))
    for number in range(min(options.tokens + 2, decoder.room()) if options.tokens else 0):
        began = time.perf_counter()
        step()
        if number >= 2:
            token.append((time.perf_counter() - began) * 1e3)
    if "torch" in sys.modules:
        raise SystemExit("the runtime imported torch")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"prefill_ms": prefill, "token_ms": token, "prompt_tokens": count, "visual_tokens": visual, "peak_rss_mib": peak}))


if __name__ == "__main__":
    main()
