"""Accuracy of tiny-llava bundles on fresh scenes, one question a scene: exact match with Wilson's intervals, methods at equal counts.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --scenes 50 --only fastv-98 pool-49

Every bundle answers the same questions about the same scenes, whose handwriting training never saw. Random selection after the projector
leaves a plain sequence, so that positions are numbered anew; at `decoder.0` the same tokens stay with the positions they had: the pair
shows what the rule costs. Writes results/accuracy.json and ACCURACY.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples" / "tiny-llava")]

from benchmarks._common import save  # noqa: E402

if TYPE_CHECKING:
    from tmc_export.runtime.session import Session

__all__ = ["BUNDLES", "Bundle", "collect", "paired"]

MODEL = REPOSITORY / "examples" / "tiny-llava"
FIRST_SCENE = 500_000  # far from every seed used elsewhere
KINDS = ("what", "colour", "digit", "exist", "count")


@dataclass(frozen=True)
class Bundle:
    """One row of the table.

    Attributes:
        name: of the bundle.
        tokens: visual tokens that the last decoder layer sees.
        compress: entries of the recipe; none for the whole picture.
        says: what the row is.
    """

    name: str
    tokens: int
    compress: tuple[str, ...]
    says: str


BUNDLES = (
    Bundle("whole", 196, (), "uncompressed"),
    Bundle("fastv-98", 98, ("{at: decoder.2, method: fastv, keep: 98}",), "fastv after decoder layer 2"),
    Bundle("visionzip-98", 98, ("{at: encoder, method: visionzip, dominant: 88, contextual: 10}",), "visionzip, 88 + 10"),
    Bundle("tome-100", 100, ("{at: encoder, method: tome, r: 24}",), "tome, 24 a layer"),
    Bundle("downsample-100", 100, ("{at: input, method: downsample, grid: [10, 10]}",), "smaller picture, 10x10 patches"),
    Bundle("random-98", 98, ("{at: projector, method: random, keep: 98}",), "random, positions numbered anew"),
    Bundle("random-98-kept", 98, ("{at: decoder.0, method: random, keep: 98}",), "random, positions kept"),
    Bundle("random-98-late", 98, ("{at: decoder.2, method: random, keep: 98}",), "random after decoder layer 2, positions kept"),
    Bundle("fastv-49", 49, ("{at: decoder.2, method: fastv, keep: 49}",), "fastv after decoder layer 2"),
    Bundle("visionzip-49", 49, ("{at: encoder, method: visionzip, dominant: 44, contextual: 5}",), "visionzip, 44 + 5"),
    Bundle("tome-48", 48, ("{at: encoder, method: tome, r: 37}",), "tome, 37 a layer"),
    Bundle("pool-49", 49, ("{at: projector, method: pool, kernel: 2, mode: average}",), "2x2 average pooling"),
    Bundle("downsample-49", 49, ("{at: input, method: downsample, grid: [7, 7]}",), "smaller picture, 7x7 patches"),
    Bundle("random-49", 49, ("{at: projector, method: random, keep: 49}",), "random, positions numbered anew"),
    Bundle("random-49-kept", 49, ("{at: decoder.0, method: random, keep: 49}",), "random, positions kept"),
    Bundle("random-49-late", 49, ("{at: decoder.2, method: random, keep: 49}",), "random after decoder layer 2, positions kept"),
)
PAIRS = (("random-98-kept", "random-98"), ("random-49-kept", "random-49"))


def collect(count: int) -> list[tuple[Any, Any]]:
    """Take scenes in the order of their seeds, one question each, the kinds in turn; a scene that lacks the kind is passed over."""
    from scenes import scene

    found: list[tuple[Any, Any]] = []
    seed = FIRST_SCENE
    while len(found) < count:
        drawn = scene(seed, "heldout")
        seed += 1
        wanted = KINDS[len(found) % len(KINDS)]
        found += [(drawn.image, q) for q in drawn.questions if q.kind == wanted]
    return found


def paired(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of two shares on the same questions, with its 95 % interval (normal, from the pairs that differ).

    >>> [round(x, 3) for x in paired([True] * 60 + [False] * 40, [True] * 50 + [False] * 50)]
    [0.1, 0.041, 0.159]
    """
    n = len(first)
    won = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    difference = (won - lost) / n
    reach = 1.959964 * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    return difference, difference - reach, difference + reach


def _sessions(names: Sequence[str], folder: Path) -> Iterator[tuple[Bundle, Session]]:
    """Build and open the bundles one after the other."""
    import tmc_export

    for bundle in BUNDLES:
        if names and bundle.name not in names:
            continue
        lines = ["recipe: 1", f"name: {bundle.name}", f"model: {{source: {MODEL}, dtype: float32}}"]
        lines += ["inputs: {images: 1, text_tokens: 32, new_tokens: 16}"]
        lines += ["compress:", *(f"  - {entry}" for entry in bundle.compress)] if bundle.compress else []
        recipe = folder / f"{bundle.name}.yaml"
        recipe.write_text("\n".join([*lines, "target: {device: cpu, runtime: onnxruntime}", ""]), "utf-8")
        tmc_export.build(recipe, folder / bundle.name, engines=False, record=False)
        yield bundle, tmc_export.load(folder / bundle.name, threads=1)


def _answers(session: Session, asked: Sequence[tuple[Any, Any]]) -> tuple[list[bool], list[dict[str, Any]]]:
    """Ask everything; which answers are right, and what the first picture kept."""
    right, kept = [], []
    for image, question in asked:
        answer = session.generate([image], question.text)
        right.append(" ".join(answer.text.split()) == question.answer)
        kept.append(answer.kept)
    return right, kept


def _row(bundle: Bundle, right: Sequence[bool], asked: Sequence[tuple[Any, Any]], seconds: float) -> dict[str, Any]:
    from evaluate import wilson

    low, high = wilson(sum(right), len(right))
    kinds = {kind: [r for r, (_, q) in zip(right, asked, strict=True) if q.kind == kind] for kind in KINDS}
    by_kind = {kind: round(sum(marks) / len(marks), 4) for kind, marks in kinds.items() if marks}
    share = sum(right) / len(right)
    return {
        "what": f"{bundle.tokens} tokens: {bundle.says}", "figure": f"{share:.3f} ({low:.3f} to {high:.3f})",
        "name": bundle.name, "tokens": bundle.tokens, "says": bundle.says, "right": sum(right), "questions": len(right),
        "share": round(share, 4), "low": round(low, 4), "high": round(high, 4), "by_kind": by_kind, "seconds": round(seconds, 1),
    }  # fmt: skip


def _pair_rows(marks: dict[str, list[bool]], kept: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Kept against renumbered positions; the tokens are the same, which is checked."""
    from tmc_export.graphs.random import priorities

    for better, worse in PAIRS:
        if better not in marks or worse not in marks:
            continue
        count = next(b.tokens for b in BUNDLES if b.name == worse)
        places = priorities(196, 0)
        drawn = tuple(i for i in range(196) if places[i] >= 196 - count)
        (cut,) = kept[better][0].values()
        same = cut[0] == drawn and all(k == kept[better][0] for k in kept[better])
        difference, low, high = paired(marks[better], marks[worse])
        yield {
            "what": f"{count} random tokens: positions kept minus renumbered, in points",
            "figure": f"{100 * difference:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            "bound": "above 0: the interval; the kept set is the draw itself", "ok": bool(low > 0 and same), "same_tokens": same,
        }  # fmt: skip


def _table(rows: Sequence[dict[str, Any]], scenes: int) -> str:
    lines = [
        "# Accuracy of tiny-llava",
        "",
        "Written by `python benchmarks/accuracy.py`; do not edit.",
        "",
        f"Exact match of bundles (onnxruntime, float32) on {scenes} fresh scenes with held-out handwriting, one question a scene, the five",
        "kinds in turn; 95 % intervals after Wilson. All rows answer the same questions, so that differences between rows are known better",
        "than the intervals of two rows suggest. Tokens are those of the last decoder layer: fastv and late random selection see all 196",
        "in two layers of four. tiny-llava has seen no compressed picture in training; what other models lose, this table does not say.",
        "",
        "| tokens | method | exact match | 95 % interval | " + " | ".join(KINDS) + " |",
        "|" + "---|" * (4 + len(KINDS)),
    ]
    for row in (r for r in rows if "share" in r):
        kinds = " | ".join(f"{row['by_kind'].get(kind, float('nan')):.2f}" for kind in KINDS)
        lines.append(f"| {row['tokens']} | {row['says']} | {row['share']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {kinds} |")
    lines += ["", "The same tokens under two position rules, compared question by question:", ""]
    lines += [f"- {r['what']}: {r['figure']}" for r in rows if "share" not in r]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--only", nargs="+", choices=[b.name for b in BUNDLES], default=[], help="these rows only; nothing is written")
    arguments = parser.parse_args()
    asked = collect(arguments.scenes)
    rows: list[dict[str, Any]] = []
    marks: dict[str, list[bool]] = {}
    kept: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="tmc-accuracy-") as folder:
        for bundle, session in _sessions(arguments.only, Path(folder)):
            began = time.perf_counter()
            marks[bundle.name], kept[bundle.name] = _answers(session, asked)
            rows.append(_row(bundle, marks[bundle.name], asked, time.perf_counter() - began))
            print(f"{bundle.name}: {rows[-1]['figure']}, {rows[-1]['seconds']} s", flush=True)
    rows += _pair_rows(marks, kept)
    print(_table(rows, len(asked)))
    if not arguments.only:
        what = f"Exact match of tiny-llava bundles on {len(asked)} fresh scenes, one question each (ACCURACY.md has the kinds)."
        save("accuracy", {"what": what, "scenes": len(asked), "first_scene": FIRST_SCENE, "rows": rows})
        (REPOSITORY / "benchmarks" / "ACCURACY.md").write_text(_table(rows, len(asked)), "utf-8")


if __name__ == "__main__":
    main()
