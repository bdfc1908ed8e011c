"""Times onnxruntime-genai on one model folder in a process of its own; runs in the environment that `genai_compare.py` makes.

    python benchmarks/_genai_worker.py FOLDER --prompt 640 --prefills 3 --tokens 32 --threads 2

Prints one JSON object like `_decoder_worker.py`. A prefill is `append_tokens`, which ends with the logits of the prompt; a token is
`generate_next_token` from the third on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._token_turns import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--prompt", type=int, default=640)
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--serve", action="store_true", help="decode as many tokens as each line of the input says; see `_token_turns.py`")
    options = parser.parse_args()
    config = og.Config(options.folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": options.threads}}}}))
    model = og.Model(config)
    ids = np.random.default_rng(0).integers(300, 30000, options.prompt).astype(np.int32)
    length = options.prompt + (64 if options.serve else max(options.tokens, 1) + 4)
    prefill: list[float] = []
    token: list[float] = []
    for number in range(options.prefills + 1):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        began = time.perf_counter()
        generator.append_tokens(ids)
        took = (time.perf_counter() - began) * 1e3
        if number:
            prefill.append(took)
    if options.serve:
        serve(generator.generate_next_token, lambda: length - generator.token_count(), lambda: generator.rewind_to(options.prompt))
    for number in range(options.tokens + 2 if options.tokens else 0):
        began = time.perf_counter()
        generator.generate_next_token()
        if number >= 2:
            token.append((time.perf_counter() - began) * 1e3)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"prefill_ms": prefill, "token_ms": token, "prompt_tokens": options.prompt, "peak_rss_mib": peak}))


if __name__ == "__main__":
    main()
