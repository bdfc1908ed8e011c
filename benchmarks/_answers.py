"""Asks a bundle questions and keeps what schemes are compared by: answers, how sure they were, kept tokens, the first token's logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["ask", "divergence", "overlap"]


def ask(
    bundle: Path, asked: Sequence[tuple[Any, str]], threads: int | None = 1, accuracy: int = 4, tokens: int | None = None
) -> dict[str, Any]:
    """Ask everything, each in a conversation of its own.

    Args:
        bundle: for onnxruntime.
        asked: a picture and a question each.
        threads: of onnxruntime.
        accuracy: level at which int4 products are computed.
        tokens: of an answer at most; all that the bundle has room for when None.

    Returns:
        Per question: `texts`, `leads` (least lead of the best logit over the answer, relative to the largest magnitude), `kept` (for each
        selecting stage, the tokens that stay, by where they come from), and `first`, the first token's log-probabilities.
    """
    import numpy as np

    from tmc_export.graphs import METHODS
    from tmc_export.runtime.session import load

    session = load(bundle, threads=threads, int4_accuracy=accuracy)
    selecting = [[METHODS.get(name).mechanism != "transform" for name in vision.stages] for vision in session.program.vision]
    seen: list[Any] = []
    sources: list[list[int]] = []
    run, step = session.run_prompt, session.decoder.step

    def first(prompt: Any, route: Any = "auto") -> Any:
        trace = run(prompt, route)
        seen.append(trace.logits.reshape(-1))
        for (bucket, _), stages in zip(prompt.pixels, prompt.sources, strict=True):
            sources.extend([int(n) for n in stage if n >= 0] for stage, is_one in zip(stages, selecting[bucket], strict=True) if is_one)
        return trace

    def later(token: int, *, keep: bool = True) -> Any:
        logits = step(token, keep=keep)
        seen.append(np.array(logits).reshape(-1))
        return logits

    session.run_prompt, session.decoder.step = first, later  # type: ignore[method-assign]
    more = {} if tokens is None else {"max_new_tokens": tokens}
    found: dict[str, Any] = {"texts": [], "leads": [], "kept": [], "first": []}
    for image, question in asked:
        seen.clear()
        sources.clear()
        got = session.generate([image], question, **more)
        found["texts"].append(" ".join(got.text.split()))
        found["leads"].append(min(_lead(logits) for logits in seen))
        found["kept"].append([*sources] + [[int(n) for n in p] for places in got.kept.values() for p in places])
        found["first"].append([round(float(x), 5) for x in _log_softmax(seen[0])])
    return found


def _lead(logits: Any) -> float:
    best = sorted(logits.tolist())[-2:]
    return float((best[1] - best[0]) / max(abs(logits.max()), abs(logits.min())))


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def divergence(mine: dict[str, Any], base: dict[str, Any]) -> tuple[float, float]:
    """Compare the first tokens: mean KL divergence from the base's distribution in nats, and how often the best token is the same."""
    import numpy as np

    p, q = (np.array(x["first"]) for x in (base, mine))
    return float((np.exp(p) * (p - q)).sum(1).mean()), float((p.argmax(1) == q.argmax(1)).mean())


def overlap(mine: dict[str, Any], base: dict[str, Any]) -> float | None:
    """Share of the base's kept tokens that are kept here, too, mean over pictures and stages; None where nothing is selected."""
    shares = [
        len(set(a) & set(b)) / len(set(b)) for m, n in zip(mine["kept"], base["kept"], strict=True) for a, b in zip(m, n, strict=True) if b
    ]
    return sum(shares) / len(shares) if shares else None
