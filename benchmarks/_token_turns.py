"""Tokens of several processes in turn: whatever slows the machine for a second meets all of them.

A process of its own per decoder, all alive at once, and one after the other decodes a few tokens while the others sleep. Where processes
follow each other whole, the machine's speed between two of them differs by more than decoders do that are to be compared. What a process
keeps from its start, such as where its weights lie, is averaged over rounds of new processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

__all__ = ["PER_TURN", "serve", "take_token_turns"]

PER_TURN = 5
"""Tokens of a turn. The first one wakes threads and finds nothing in the cache; it is not counted."""
_REST = 0.01
"""Seconds between turns, in which threads of the process before stop waiting awake; some may last into the token that is not counted."""


def serve(step: Callable[[], object], room: Callable[[], int], rewind: Callable[[], object]) -> None:
    """Take as many steps as each line of the input says, and answer with their milliseconds as JSON; ends with the input.

    Args:
        step: decodes a token.
        room: how many more tokens fit.
        rewind: goes back to the end of the prompt. Two steps follow that nobody times: the first is unlike others.
    """
    for line in sys.stdin:
        times = []
        if room() < int(line):
            rewind()
            step()
            step()
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            times.append((time.perf_counter() - began) * 1e3)
        print(json.dumps(times), flush=True)


def take_token_turns(commands: Mapping[str, Sequence[str]], rounds: int, turns: int) -> dict[str, list[list[float]]]:
    """Start all processes anew in every round and let them take turns.

    Args:
        commands: name → a command that runs `serve`.
        rounds: of new processes.
        turns: of each process in a round; every second one goes backwards.

    Returns:
        Name → round → milliseconds of each turn, the median of its tokens.

    Raises:
        SystemExit: a process ended early.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in commands}
    for number in range(rounds):
        with ExitStack() as stack:
            started = {}
            for name in list(commands) if number % 2 == 0 else list(commands)[::-1]:
                pipes = subprocess.Popen(list(commands[name]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment())
                started[name] = stack.enter_context(pipes)
                stack.callback(pipes.kill)
                _ask(pipes, name, 2)  # loaded, and twice warm
            for name in commands:
                found[name].append([])
            for turn in range(turns):
                for name in list(commands) if turn % 2 == 0 else list(commands)[::-1]:
                    time.sleep(_REST)
                    found[name][-1].append(statistics.median(_ask(started[name], name, PER_TURN)[1:]))
        said = ", ".join(f"{name} {statistics.median(rows[-1]):.2f} ms" for name, rows in found.items())
        print(f"  round {number + 1}/{rounds}: {said}", file=sys.stderr, flush=True)
    return found


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}


def _ask(process: subprocess.Popen[str], name: str, tokens: int) -> list[float]:
    if process.stdin is None or process.stdout is None:
        raise ValueError("a process without pipes")
    answer = ""
    with contextlib.suppress(BrokenPipeError):  # it has ended, which an empty answer says, too
        process.stdin.write(f"{tokens}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"{name} ended with {process.wait()}")
    times: list[float] = json.loads(answer)
    return times
