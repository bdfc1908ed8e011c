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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples" / "tiny-llava")]

from benchmarks._common import save  # noqa: E402

if TYPE_CHECKING:
    from tmc_export.plan.types import Plan
    from tmc_export.recipe.recipe import Recipe

__all__ = ["BUNDLES", "NOT_HERE", "Bundle", "all_bundles", "collect", "learned", "paired", "plan_of", "recipe_of"]

MODEL = REPOSITORY / "examples" / "tiny-llava"
RECIPES = REPOSITORY / "recipes"
FIRST_SCENE = 500_000  # far from every seed used elsewhere
KINDS = ("what", "colour", "digit", "exist", "count")


@dataclass(frozen=True)
class Bundle:
    """One row of the table.

    Attributes:
        name: of the row; a method's name and the tokens.
        tokens: visual tokens that the last decoder layer sees.
        says: what the row is.
        recipe: the shipped recipe; empty for rows that write their own `compress`.
        changes: settings on top of the recipe.
        compress: entries of a recipe of the row's own; none for the whole picture.
        control: the row of random selection with as many tokens at the same places; empty: there is none.
    """

    name: str
    tokens: int
    says: str
    recipe: str = ""
    changes: tuple[str, ...] = ()
    compress: tuple[str, ...] = ()
    control: str = ""


def _of(method: str, tokens: int, control: str, says: str, *changes: str, recipe: str = "") -> Bundle:
    return Bundle(f"{method}-{tokens}", tokens, f"{method}: {says}", recipe or f"tiny-llava-{method}-fp32", changes, (), control)


def _random(name: str, says: str, *cuts: tuple[str, int], first: str = "", rule: str = "") -> Bundle:
    entries = (first, *(f"{{at: {at}, method: random, keep: {keep}{rule}}}" for at, keep in cuts))
    return Bundle(name, cuts[-1][1], f"random {says}", compress=tuple(e for e in entries if e))


_ANEW = ", positions: renumber"
_TEN = "{at: input, method: downsample, grid: [10, 10]}"

BUNDLES = (
    Bundle("whole", 196, "uncompressed"),
    # about half of the tokens: the shipped recipes
    _of("adafv", 98, "random-98", "text and class attention, positions numbered anew"),
    _of("adaptive_pool", 100, "random-100", "windows that overlap, 10x10"),
    _of("auroracap", 100, "random-100", "24 pairs a layer"),
    _of("chat_univi", 98, "random-98", "clusters of three scales, 56 + 28 + 14"),
    _of("dart", 98, "random-98-kept", "what repeats the pivots least, before the decoder"),
    _of("divprune", 98, "random-98", "the tokens farthest from one another"),
    _of("evit", 98, "random-98", "class attention, layers 1 and 3, 97 and a fused one"),
    _of("fastv", 98, "random-98-late", "after decoder layer 2", recipe="quickstart"),
    _of("fitprune", 98, "random-156-126-98", "156, 126, then 98, a layer each"),
    _of("folder", 98, "random-98", "one fold in the last encoder layer"),
    _of("mustdrop", 98, "random-160-129-98", "160 after the encoder, 129 and 98 in the decoder"),
    _of("prumerge", 98, "random-98", "97 and one for the rest"),
    _of("pyramiddrop", 24, "random-98-49-24", "98, 49, then 24"),
    _of("sparsevlm", 25, "random-102-51-25", "98, 49, then 24, with 4, 2 and 1 clusters"),
    _of("st3", 98, "random-164-131-98", "164, 131, then 98"),
    _of("tokencarve", 50, "random-50-of-100", "a picture of 10x10 patches, then half of it after decoder layer 2"),
    _of("tome", 100, "random-100", "24 a layer"),
    _of("topv", 98, "random-98-late", "optimal transport, after decoder layer 2"),
    _of("visionzip", 98, "random-98", "88 + 10"),
    _of("vispruner", 98, "random-98", "50 for attention, 48 for diversity"),
    _of("vtw", 0, "", "no visual token after decoder layer 2"),
    _of("zipvl", 98, "random-98-late", "at most 98 after decoder layer 2, fewer where they hold 97.5 % of the attention"),
    _of("downsample", 100, "random-100", "a smaller picture, 10x10 patches"),
    _of("random", 98, "", "positions numbered anew"),
    _random("random-98-kept", "positions kept", ("decoder.0", 98)),
    _random("random-98-late", "after decoder layer 2, positions kept", ("decoder.2", 98)),
    _random("random-100", "positions numbered anew", ("projector", 100)),
    _random("random-98-49-24", "at pyramiddrop's places", ("decoder.1", 98), ("decoder.2", 49), ("decoder.3", 24), rule=_ANEW),
    _random("random-102-51-25", "at sparsevlm's places", ("decoder.1", 102), ("decoder.2", 51), ("decoder.3", 25), rule=_ANEW),
    _random("random-164-131-98", "at st3's places", ("decoder.1", 164), ("decoder.2", 131), ("decoder.3", 98)),
    _random("random-156-126-98", "at fitprune's places", ("decoder.1", 156), ("decoder.2", 126), ("decoder.3", 98)),
    _random("random-160-129-98", "at mustdrop's places", ("projector", 160), ("decoder.1", 129), ("decoder.2", 98), rule=_ANEW),
    _random("random-50-of-100", "at tokencarve's places", ("decoder.2", 50), first=_TEN),
    # a quarter
    _of("pool", 49, "random-49", "2x2 average"),
    _of("adafv", 49, "random-49", "text and class attention, positions numbered anew", "compress.0.keep=49"),
    _of("adaptive_pool", 49, "random-49", "windows of 2x2", "compress.0.grid=[7,7]"),
    _of("dart", 49, "random-49-kept", "what repeats the pivots least, before the decoder", "compress.0.keep=49"),
    _of("divprune", 49, "random-49", "the tokens farthest from one another", "compress.0.keep=49"),
    _of("fastv", 49, "random-49-late", "after decoder layer 2", "compress.0.keep=49", recipe="quickstart"),
    _of("prumerge", 49, "random-49", "48 and one for the rest", "compress.0.keep=48"),
    _of("tome", 48, "random-49", "37 a layer", "compress.0.r=37"),
    _of("topv", 49, "random-49-late", "optimal transport, after decoder layer 2", "compress.0.keep=49"),
    _of("visionzip", 49, "random-49", "44 + 5", "compress.0.dominant=44", "compress.0.contextual=5"),
    _of("vispruner", 49, "random-49", "25 for attention, 24 for diversity", "compress.0.keep=49", "compress.0.important=0.51"),
    _of("downsample", 49, "random-49", "a smaller picture, 7x7 patches", "compress.0.grid=[7,7]"),
    _of("random", 49, "", "positions numbered anew", "compress.0.keep=49"),
    _random("random-49-kept", "positions kept", ("decoder.0", 49)),
    _random("random-49-late", "after decoder layer 2, positions kept", ("decoder.2", 49)),
)
SMALLER = ("downsample-100", "downsample-49")
PAIRS = (("random-98-kept", "random-98"), ("random-49-kept", "random-49"))
NOT_HERE = {
    "globalcom2": "needs a thumbnail and crops, and tiny-llava takes one picture as it is",
    "trim": "needs a CLIP text tower of the vision tower's space, and tiny-llava's was trained without one",
}
"""Training-free methods without a row, and why."""


# ----------------------------------------------------------------------------------------------------------- rows and plans
def recipe_of(bundle: Bundle) -> Recipe:
    """Read the recipe of a row."""
    from tmc_export.recipe import load_recipe

    if bundle.recipe:
        return load_recipe(RECIPES / f"{bundle.recipe}.yaml", bundle.changes)
    lines = ["recipe: 1", f"name: {bundle.name}", f"model: {{source: {MODEL}, dtype: float32}}"]
    lines += ["inputs: {images: 1, text_tokens: 32, new_tokens: 16}"]
    lines += ["compress:", *(f"  - {entry}" for entry in bundle.compress)] if bundle.compress else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text("\n".join([*lines, "target: {device: cpu, runtime: onnxruntime}", ""]), "utf-8")
        return load_recipe(path)


def plan_of(recipe: Recipe) -> Plan:
    """Plan a recipe; no torch is needed."""
    from tmc_export.plan.make import make_plan
    from tmc_export.plan.source import fetch, read_model_files

    return make_plan(recipe, read_model_files(fetch(recipe, weights=False)))[0]


def _layers(plan: Plan) -> list[int]:
    """Visual tokens that every decoder layer sees."""
    return [block.visual_tokens for block in plan.blocks for _ in range(block.first, block.last)]


@functools.cache
def learned() -> tuple[tuple[str, str, str], ...]:
    """Learned methods of the shipped recipes: method, recipe, and its weights: `trained`, `missing` (their file is) or `random`."""
    from tmc_export.graphs import METHODS
    from tmc_export.recipe import load_recipe

    found = []
    for path in sorted(RECIPES.glob("tiny-llava-*.yaml")):
        entries = load_recipe(path).compress
        for entry in entries:
            if entry.method in METHODS and not METHODS.get(entry.method).training_free:
                file = None if entry.weights is None else entry.weights.file
                found.append((entry.method, path.stem, "random" if file is None else _file_state(RECIPES / file)))
    return tuple(found)


def _file_state(path: Path) -> str:
    return "trained" if path.is_file() else "missing"


@functools.cache
def all_bundles() -> tuple[Bundle, ...]:
    """The table's rows, those of methods trained on the scenes included."""
    more = []
    for method, recipe, weights in learned():
        if weights == "trained":
            tokens = _layers(plan_of(_shipped(recipe)))[-1]
            control = min((b for b in BUNDLES if b.name in ("random-98", "random-49")), key=lambda b: abs(b.tokens - tokens)).name
            more.append(Bundle(f"{method}-{tokens}", tokens, f"{method}: trained on the scenes", recipe, (), (), control))
    return (*BUNDLES, *more)


def _shipped(recipe: str) -> Recipe:
    from tmc_export.recipe import load_recipe

    return load_recipe(RECIPES / f"{recipe}.yaml")


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
    return {"name": bundle.name, "marks": marks, "layers": _layers(plan_of(recipe)), "seconds": seconds, "is_draw": is_draw}


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
            yield str(_layers(plan_of(_shipped(recipe)))[-1]), method, "random weights: a graph is shown, its accuracy is n/a"
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
