"""Mixed precision within a budget: which units must stay in the base precision so that few enough answers change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tmc_export.api.fitting import fitted_target
from tmc_export.api.measuring import effect_of
from tmc_export.api.sensitivity import TOKENS, Bench, Progress, Row, open_bench, questions_of
from tmc_export.api.units import By, Unit, units_of
from tmc_export.core.errors import LegalityError, RecipeError
from tmc_export.recipe import Recipe, load_recipe
from tmc_export.recipe.rewrite import write_kept

__all__ = ["BudgetResult", "allowed_changes", "fewest", "fit_budget"]


@dataclass(frozen=True)
class BudgetResult:
    """What was pinned and written.

    Attributes:
        recipe: the file that was written.
        budget: share of the answers that may change.
        samples: questions.
        tokens: of an answer, at most.
        allowed: answers of those that may change.
        before, after: answers that change end to end with the recipe as it was, and as it is now.
        units: what could be pinned.
        pinned: what was, the worst first.
        keep: part → the words that were added.
        tried: how often all questions were answered with other units pinned.
    """

    recipe: str
    budget: float
    samples: int
    tokens: int
    allowed: int
    before: int
    after: int
    units: int
    pinned: tuple[str, ...]
    keep: Mapping[str, tuple[str, ...]]
    tried: int


def allowed_changes(budget: float, samples: int) -> int:
    """Return how many answers may change.

    A budget above 0 must be worth one answer at least: else the questions could only show that nothing changed, and not that more would
    be too much. A budget of 0 asks that none changes, of however many.

    Raises:
        RecipeError: the budget is no share below 100 %.
        LegalityError: the questions are too few; says how many it takes.

    >>> allowed_changes(0.005, 400), allowed_changes(0.0, 15)
    (2, 0)
    """
    if not 0 <= budget < 1:
        raise RecipeError(f"--budget: {_percent(budget)} is no budget; give a share from 0% to below 100%, such as 0.5%")
    allowed = math.floor(budget * samples + 1e-9)
    if budget and not allowed:
        raise LegalityError(
            f"--budget: {samples} questions cannot show {_percent(budget)}: one changed answer is {_percent(1 / samples)} already; give at "
            f"least {math.ceil(1 / budget - 1e-9)} questions (--prompts, --samples), or write --budget 0%: none of the {samples} may change"
        )
    return allowed


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def fewest(count: int, within: Callable[[int], bool]) -> int | None:
    """Return the fewest of a ranking's `count` units to pin so that `within(pinned)` holds, by bisection.

    What is returned has been tried. Where more pinned units make it worse again, fewer may do; a ranking does not say.

    Returns:
        None where pinning all of them is not enough.

    >>> fewest(10, lambda pinned: pinned >= 3), fewest(4, lambda pinned: False)
    (3, None)
    """
    if within(0):
        return 0
    if not count or not within(count):
        return None
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def fit_budget(
    recipe: str | Path,
    budget: float,
    out: str | Path | None = None,
    *,
    by: By = "layer",
    samples: int | None = None,
    images: str | Path | None = None,
    prompts: str | Path | None = None,
    tokens: int = TOKENS,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> BudgetResult:
    """Pin what must stay in the base precision, and write a copy of the recipe that says so in `keep`.

    Units are ranked by what each does alone (the KL divergence of the first answer token); bisection finds how many of the worst must be
    pinned until at most the budget's share of the answers changes end to end.

    Args:
        recipe: a recipe file, or the name of a shipped recipe.
        budget: share of the answers that may change; see `allowed_changes`.
        out: the file to write; beside the recipe as `<name>-fitted.yaml` when None.
        by: what a unit is.
        samples: questions at most.
        images: folder of pictures for `prompts`.
        prompts: the questions; see `questions_of`.
        tokens: of an answer, at most.
        force: replace `out`.
        progress: called with one line per step.

    Raises:
        RecipeError: as `open_bench`, or `out` exists.
        LegalityError: the questions are too few, or answers change even with everything pinned that can be.
    """
    loaded = load_recipe(recipe)
    target = fitted_target(recipe, out, force)
    asked = questions_of(loaded, samples, images, prompts)
    allowed = allowed_changes(budget, len(asked))
    with open_bench(loaded, asked, tokens=tokens, progress=progress) as bench:
        search = _Search(bench, by, allowed, tokens, progress)
        pinned = search.pinned()
        keep, added = _words(loaded, pinned)
        bench.check(keep)
        before, after = search.changed[0], search.changed[len(pinned)]
    write_kept(loaded, keep, target)
    labels = tuple(f"{unit.part} {unit.label}".strip() for unit in pinned)
    return BudgetResult(str(target), budget, len(asked), tokens, allowed, before, after, search.count, labels, added, len(search.changed))


class _Search:
    """Pinning the worst units of a ranking, more or fewer of them.

    Attributes:
        changed: units pinned → answers that change.
        count: units that can be pinned.
    """

    def __init__(self, bench: Bench, by: By, allowed: int, tokens: int, progress: Progress) -> None:
        self._bench, self._by, self._allowed, self._tokens, self._progress = bench, by, allowed, tokens, progress
        units = units_of(bench.simulation, by)
        self._units, self._fixed = [u for u in units if u.words], [u for u in units if not u.words]
        self._ranked: list[Unit] | None = None
        self.changed: dict[int, int] = {}
        self.count = len(self._units)

    def pinned(self) -> tuple[Unit, ...]:
        """Return the units to pin, the worst first.

        Raises:
            LegalityError: all of them are not enough.
        """
        number = fewest(self.count, self._within)
        while number is not None and 0 < number < self.count and self._by == "linear" and not self._holds(number):
            number += 1
        if number is None:
            rest = ", ".join(u.part for u in self._fixed) or "nothing"
            place = self._bench.recipe.origin(("quantize",))
            raise LegalityError(
                f"{place}: {self.changed[self.count]} of {len(self._bench.samples)} answers change with all {self.count} units kept in the "
                f"base precision, {self._allowed} may; quantized then is {rest}, which keep cannot name: remove it, or allow more"
            )
        return tuple(self._ranking()[:number]) if number else ()

    def _ranking(self) -> list[Unit]:
        if self._ranked is None:
            rows: list[Row] = []
            for number, unit in enumerate(self._units, 1):
                self._progress(f"{unit.part} {unit.label} alone ({number}/{self.count})")
                free = self._bench.measuring.compare(unit.names, frozen=False, answers=False)
                rows.append(Row(unit, effect_of(free), None))
            self._ranked = [row.unit for row in sorted(rows, key=lambda row: -row.end_to_end.kl)]
        return self._ranked

    def _within(self, pinned: int) -> bool:
        left = [*(self._ranking()[pinned:] if pinned else self._units), *self._fixed]
        self.changed[pinned] = self._count(self._bench, [name for unit in left for name in unit.names])
        self._progress(f"{pinned} of {self.count} units pinned: {self.changed[pinned]} answers change, {self._allowed} may")
        return self.changed[pinned] <= self._allowed

    def _holds(self, pinned: int) -> bool:
        """Whether it also holds when the rest is calibrated anew: linears that read one input share what calibration finds."""
        keep, _ = _words(self._bench.recipe, self._ranking()[:pinned])
        with self._bench.with_keep(keep, self._tokens) as bench:
            self.changed[pinned] = self._count(bench, bench.everything())
        self._progress(f"{pinned} units pinned, calibrated anew: {self.changed[pinned]} answers change, {self._allowed} may")
        return self.changed[pinned] <= self._allowed

    def _count(self, bench: Bench, names: Sequence[str]) -> int:
        return sum(not c.answer for c in bench.measuring.compare(names, frozen=False, answers=True))


def _words(recipe: Recipe, pinned: Sequence[Unit]) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Per part, all words of `keep`, and those that are new."""
    added: dict[str, tuple[str, ...]] = {}
    for unit in pinned:
        part = recipe.quantize.part(unit.part)
        known = () if part is None else part.keep
        added[unit.part] = tuple(w for w in dict.fromkeys([*added.get(unit.part, ()), *unit.words]) if w not in known)
    keep = {}
    for name, words in added.items():
        part = recipe.quantize.part(name)
        keep[name] = (*(() if part is None else part.keep), *words)
    return keep, added
