"""The rows of the accuracy table: each method's shipped recipe, its control, and what it plans to.

A method's row is its shipped recipe (`recipes/`), at other counts with one option changed; beside it stands random selection that leaves as
many tokens at the same places, and a smaller picture. Needs no torch.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmc_export.plan.types import Plan
    from tmc_export.recipe.recipe import Recipe

__all__ = [
    "BUNDLES", "MODEL", "NOT_HERE", "PAIRS", "RECIPES", "SMALLER", "Bundle", "all_bundles", "layers_of", "learned", "plan_of", "recipe_of",
    "shipped",
]  # fmt: skip

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "examples" / "tiny-llava"
RECIPES = REPOSITORY / "recipes"


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


def layers_of(plan: Plan) -> list[int]:
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
            tokens = layers_of(plan_of(shipped(recipe)))[-1]
            control = min((b for b in BUNDLES if b.name in ("random-98", "random-49")), key=lambda b: abs(b.tokens - tokens)).name
            more.append(Bundle(f"{method}-{tokens}", tokens, f"{method}: trained on the scenes", recipe, (), (), control))
    return (*BUNDLES, *more)


def shipped(recipe: str) -> Recipe:
    """Read a shipped recipe."""
    from tmc_export.recipe import load_recipe

    return load_recipe(RECIPES / f"{recipe}.yaml")
