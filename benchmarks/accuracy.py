"""Accuracy of tiny-llava bundles on fresh scenes, one question a scene: exact match with Wilson's intervals, methods at equal counts.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --scenes 50 --only fastv-98 pool-49
    python benchmarks/accuracy.py --part 0/2 & python benchmarks/accuracy.py --part 1/2; wait; python benchmarks/accuracy.py --merge

Every bundle answers the same questions about the same scenes, whose handwriting training never saw. A method's row is its shipped recipe
(`recipes/`), at other counts with one option changed; beside it stands random selection that leaves as many tokens at the same places, and
a smaller picture. Random selection after the projector leaves a plain sequence, so that positions are numbered anew; at `decoder.0` the
same tokens stay with the positions they had: the pair shows what the rule costs. A finished row is a file in `--rows`; it is used again
while recipe, scenes and methods are the same. Writes results/accuracy.json and ACCURACY.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples" / "tiny-llava")]

from benchmarks._accuracy_rows import (  # noqa: E402
    BUNDLES,
    MODEL,
    NOT_HERE,
    PAIRS,
    RECIPES,
    SMALLER,
    Bundle,
    all_bundles,
    layers_of,
    learned,
    plan_of,
    recipe_of,
    shipped,
)
from benchmarks._common import save  # noqa: E402

if TYPE_CHECKING:
    from tmc_export.recipe.recipe import Recipe

__all__ = ["MODEL", "RECIPES", "collect", "paired"]

FIRST_SCENE = 500_000  # far from every seed used elsewhere
KINDS = ("what", "colour", "digit", "exist", "count")


# --------------------------------------------------------------------------------------------------------------- answers
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


@functools.cache
def _methods() -> str:
    """Hash of the methods' code."""
    digest = hashlib.sha256()
    for path in sorted((REPOSITORY / "graphs").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _key(recipe: Recipe, scenes: int) -> str:
    weights = [(RECIPES / e.weights.file).read_bytes() for e in recipe.compress if e.weights is not None and e.weights.file is not None]
    found = hashlib.sha256(f"{recipe.canonical_json()} {scenes} {_methods()}".encode())
    for data in weights:
        found.update(data)
    return found.hexdigest()


def answer(bundle: Bundle, recipe: Recipe, asked: Sequence[tuple[Any, Any]], folder: Path) -> dict[str, Any]:
    """Build a row's bundle and ask everything.

    Returns:
        `marks` (a 1 for every right answer, else 0), `layers` (visual tokens that every decoder layer sees), `seconds`; `is_draw` of a
        random row at `decoder.0`: it kept exactly the draw, every time.
    """
    import tmc_export

    tmc_export.build(recipe, folder / bundle.name, engines=False, record=False)
    session = tmc_export.load(folder / bundle.name, threads=1)
    began = time.perf_counter()
    marks, is_draw = "", True
    for image, question in asked:
        got = session.generate([image], question.text)
        marks += "01"[" ".join(got.text.split()) == question.answer]
        is_draw = is_draw and (not bundle.name.endswith("-kept") or _is_draw(bundle, got.kept))
    seconds = round(time.perf_counter() - began, 1)
    return {"name": bundle.name, "marks": marks, "layers": layers_of(plan_of(recipe)), "seconds": seconds, "is_draw": is_draw}


def _is_draw(bundle: Bundle, kept: dict[str, Any]) -> bool:
    from tmc_export.graphs.random import priorities

    places = priorities(196, 0)
    drawn = tuple(i for i in range(196) if places[i] >= 196 - bundle.tokens)
    (cut,) = kept.values()
    return bool(cut[0] == drawn)


def run_rows(chosen: Sequence[Bundle], asked: Sequence[tuple[Any, Any]], rows: Path) -> list[str]:
    """Run the rows that are not there yet; returns what failed."""
    from tmc_export.core.errors import TmcError

    rows.mkdir(parents=True, exist_ok=True)
    failed = []
    for bundle in chosen:
        recipe = recipe_of(bundle)
        key, file = _key(recipe, len(asked)), rows / f"{bundle.name}.json"
        if file.is_file() and json.loads(file.read_text("utf-8"))["key"] == key:
            print(f"{bundle.name}: there already", flush=True)
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="tmc-accuracy-") as folder:
                found = answer(bundle, recipe, asked, Path(folder))
        except TmcError as error:
            failed.append(f"{bundle.name}: {' '.join(str(error).split())}")
            print(f"failed: {failed[-1]}", flush=True)
            continue
        file.write_text(json.dumps({"key": key, **found}) + "\n", "utf-8")
        print(f"{bundle.name}: {found['marks'].count('1') / len(asked):.3f}, {found['seconds']} s", flush=True)
    return failed


# ----------------------------------------------------------------------------------------------------------------- table
def read_rows(chosen: Sequence[Bundle], scenes: int, rows: Path) -> dict[str, dict[str, Any]]:
    """Read finished rows.

    Raises:
        SystemExit: rows are missing, or of other code or scenes.
    """
    found, missing = {}, []
    for bundle in chosen:
        file = rows / f"{bundle.name}.json"
        data = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        if data.get("key") == _key(recipe_of(bundle), scenes):
            found[bundle.name] = data
        else:
            missing.append(bundle.name)
    if missing:
        raise SystemExit(f"{rows}: no rows of this code and {scenes} scenes for {', '.join(missing)}; run them first")
    return found


def _points(first: str, second: str) -> tuple[str, tuple[float, float, float]]:
    found = paired([m == "1" for m in first], [m == "1" for m in second])
    low, high = (100 * x for x in found[1:])
    return f"{100 * found[0]:+.1f} ({low:+.1f} to {high:+.1f})", found


def _row(bundle: Bundle, data: dict[str, dict[str, Any]], kinds: Sequence[str]) -> dict[str, Any]:
    from evaluate import wilson

    mine = data[bundle.name]
    marks, layers = mine["marks"], mine["layers"]
    right = marks.count("1")
    low, high = wilson(right, len(marks))
    by_kind = {kind: [m == "1" for m, k in zip(marks, kinds, strict=True) if k == kind] for kind in KINDS}
    share = right / len(marks)
    found: dict[str, Any] = {
        "what": f"{bundle.tokens} tokens: {bundle.says}", "figure": f"{share:.3f} ({low:.3f} to {high:.3f})",
        "name": bundle.name, "tokens": bundle.tokens, "mean_tokens": sum(layers) / len(layers), "says": bundle.says, "right": right,
        "questions": len(marks), "share": round(share, 4), "low": round(low, 4), "high": round(high, 4),
        "by_kind": {kind: round(sum(m) / len(m), 4) for kind, m in by_kind.items() if m}, "seconds": mine["seconds"],
        "control": bundle.control, "minus_random": "", "minus_downsample": "",
    }  # fmt: skip
    if bundle.control in data:
        found["minus_random"], found["difference"] = _points(marks, data[bundle.control]["marks"])
        found["figure"] += f"; minus {bundle.control}, in points: {found['minus_random']}"
    smaller = min((b for b in BUNDLES if b.name in SMALLER), key=lambda b: abs(b.tokens - bundle.tokens)).name
    if bundle.tokens and smaller in data and bundle.name not in ("whole", *SMALLER):
        found["smaller"], found["minus_downsample"] = smaller, _points(marks, data[smaller]["marks"])[0]
    return found


def _pair_rows(data: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Kept against renumbered positions; the tokens are the same, which is checked."""
    for better, worse in PAIRS:
        if better in data and worse in data:
            figure, (_, low, _) = _points(data[better]["marks"], data[worse]["marks"])
            same = data[better]["is_draw"]
            yield {
                "what": f"{next(b.tokens for b in BUNDLES if b.name == worse)} random tokens: positions kept minus renumbered, in points",
                "figure": figure, "bound": "above 0: the interval; the kept set is the draw itself", "ok": bool(low > 0 and same),
                "same_tokens": same,
            }  # fmt: skip


def _without() -> Iterator[tuple[str, str, str]]:
    """Methods without figures: tokens, method, why."""
    trained = {method for method, _, weights in learned() if weights == "trained"}
    for method, recipe, weights in learned():
        if weights == "random" and method not in trained:
            yield str(layers_of(plan_of(shipped(recipe)))[-1]), method, "random weights: a graph is shown, its accuracy is n/a"
    for method, why in NOT_HERE.items():
        yield "", method, why


def _table(rows: Sequence[dict[str, Any]], scenes: int) -> str:
    lines = [
        "# Accuracy of tiny-llava",
        "",
        "Written by `python benchmarks/accuracy.py`; do not edit.",
        "",
        f"Exact match of bundles (onnxruntime, float32) on {scenes} fresh scenes with held-out handwriting, one question a scene, the five",
        "kinds in turn; 95 % intervals after Wilson. All rows answer the same questions: differences, in points, are question by question,",
        'with 95 % intervals of their own. "Minus random" is against random selection of as many tokens at the same places and under the',
        'same position rule, which the last column names; "minus downsample" against the smaller picture of 10x10 or 7x7 patches, the',
        "nearer in count. Tokens are those of the last decoder layer, and the mean is over its four layers. tiny-llava has seen no",
        "compressed picture in training, and it is small: what other models lose, this table does not say.",
        "",
        "| tokens | mean | method | exact match | 95 % interval | minus random | minus downsample | "
        + " | ".join([*KINDS, "random row |"]),
        "|" + "---|" * (8 + len(KINDS)),
    ]  # fmt: skip
    for row in (r for r in rows if "share" in r):
        kinds = " | ".join(f"{row['by_kind'].get(kind, float('nan')):.2f}" for kind in KINDS)
        lines.append(
            f"| {row['tokens']} | {row['mean_tokens']:.0f} | {row['says']} | {row['share']:.3f} | {row['low']:.3f} to {row['high']:.3f} | "
            f"{row['minus_random']} | {row['minus_downsample']} | {kinds} | {row['control']} |"
        )
    rest = [""] * (3 + len(KINDS))
    lines += [f"| {' | '.join([tokens, '', method, 'n/a', why, *rest])} |" for tokens, method, why in _without()]
    lines += ["", "The same tokens under two position rules, compared question by question:", ""]
    lines += [f"- {r['what']}: {r['figure']}" for r in rows if "share" not in r]
    return "\n".join([*lines, ""])


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"'{text}' is no part; write 0/2 and 1/2")
    return int(part), int(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=[b.name for b in all_bundles()], default=[], help="these rows; nothing is written")
    parser.add_argument("--rows", type=Path, default=REPOSITORY / "out" / "accuracy", help="a folder of finished rows")
    parser.add_argument("--part", type=_part, default=(0, 1), help="0/2: every second row, from the first; no table")
    parser.add_argument("--merge", action="store_true", help="only write the table, of finished rows")
    arguments = parser.parse_args()
    asked = collect(arguments.scenes)
    chosen = [b for b in all_bundles() if not arguments.only or b.name in arguments.only]
    part, parts = arguments.part
    failed = [] if arguments.merge else run_rows(chosen[part::parts], asked, arguments.rows)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))
    if parts > 1:
        return
    data = read_rows(chosen, len(asked), arguments.rows)
    rows = [_row(bundle, data, [q.kind for _, q in asked]) for bundle in chosen]
    rows += _pair_rows(data)
    print(_table(rows, len(asked)))
    if not arguments.only:
        what = f"Exact match of tiny-llava bundles on {len(asked)} fresh scenes, one question each (ACCURACY.md has the kinds)."
        save("accuracy", {"what": what, "scenes": len(asked), "first_scene": FIRST_SCENE, "rows": rows})
        (REPOSITORY / "benchmarks" / "ACCURACY.md").write_text(_table(rows, len(asked)), "utf-8")


if __name__ == "__main__":
    main()
