"""The process that times one bundle once: `python -m tmc_export.report._bench_worker BUNDLE ...`, one JSON line on stdout.

A process of its own, because sessions of two bundles in one would share threads and memory. An error that a user can act on is the line
`{"error": class, "message": text}`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.core.errors import TmcError
from tmc_export.core.image_rule import ImageRule
from tmc_export.runtime.session import Session, load

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Job", "main", "measure", "peak_mib"]

_WARM_TOKENS = 2


@dataclass(frozen=True)
class Job:
    """What to time.

    Attributes:
        bundle: its folder.
        images: pictures; empty: noise, as many as the bundle takes.
        prompt: the question.
        answers: whole answers that are timed, after one that is not.
        tokens: single tokens that are timed.
        backend, threads, provider: as `load` takes them.
    """

    bundle: str
    images: tuple[str, ...]
    prompt: str
    answers: int
    tokens: int
    backend: str
    threads: int | None
    provider: str = "cpu"


def peak_mib() -> float | None:
    """The most memory that was resident in this process, MiB; None where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def measure(job: Job) -> dict[str, Any]:
    """Time a bundle.

    Returns:
        `first_token_ms`, `token_ms`: one figure a run; `load_ms`; `peak_mib`; `prompt_tokens`; `visual_tokens` per block.

    Raises:
        TmcError: the bundle, a picture or the prompt is at fault.
    """
    began = time.perf_counter()
    session = load(job.bundle, backend=job.backend, threads=job.threads, provider=job.provider)
    loaded = (time.perf_counter() - began) * 1e3
    images: list[Any] = list(job.images) or _noise(session)
    first: list[float] = []
    answer = session.generate(images, job.prompt, max_new_tokens=1)
    for _ in range(job.answers):
        answer = session.generate(images, job.prompt, max_new_tokens=1)
        first.append(answer.timings.first_token_ms)
    token = _tokens(session, answer.tokens[-1], job.tokens)
    return {
        "first_token_ms": first,
        "token_ms": token,
        "load_ms": loaded,
        "peak_mib": peak_mib(),
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": list(answer.visual_tokens),
    }


def _noise(session: Session) -> list[Array]:
    """One picture of noise per place, of the largest bucket's size."""
    rules = [ImageRule.from_json(dict(v.rule)) for v in session.program.vision]
    if not rules:
        return []
    largest = max(rules, key=lambda r: r.height * r.width)
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (largest.height, largest.width, 3), dtype=np.uint8) for _ in range(session.program.images)]


def _tokens(session: Session, token: int, count: int) -> list[float]:
    """Time single steps after an answer; whether they end it does not matter for the time."""
    found: list[float] = []
    for number in range(min(count + _WARM_TOKENS, session.decoder.room())):
        began = time.perf_counter()
        logits = session.decoder.step(token, keep=False)
        token = int(np.argmax(logits))
        if number >= _WARM_TOKENS:
            found.append((time.perf_counter() - began) * 1e3)
    return found


def main() -> None:
    """Read a job from stdin, print what was measured."""
    fields = json.loads(sys.stdin.read())
    fields["images"] = tuple(fields["images"])
    try:
        found = measure(Job(**fields))
    except TmcError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
