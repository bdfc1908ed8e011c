"""`fit`: options of a recipe entry that are found on calibration prompts, for any method that defines `fit`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from tmc_export.core.errors import LegalityError, RecipeError, RuntimeInputError
from tmc_export.core.lazy import require
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Method, Site, Stage
from tmc_export.graphs._fitting import Evidence, Fitted, Option, Visit
from tmc_export.plan.entries import read_options
from tmc_export.plan.estimate import Clock, estimate
from tmc_export.plan.make import make_plan
from tmc_export.plan.resolve import resolve
from tmc_export.plan.source import fetch, read_model_files
from tmc_export.plan.types import Plan
from tmc_export.recipe import Recipe, find_recipe, load_recipe
from tmc_export.recipe.rewrite import write_fitted

if TYPE_CHECKING:
    from tmc_export.families._contract import ModelFiles
    from tmc_export.verify.statistics import Calibration, Question

__all__ = ["FitResult", "fit_recipe", "fitted_target", "read_questions", "spread"]

SAMPLES = 16
"""Calibration prompts, unless asked for another number."""
QUESTIONS = "questions.json"
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class FitResult:
    """What was fitted and written.

    Attributes:
        recipe: the file that was written.
        entry, method: which entry of `compress`.
        at, options: what it says now.
        goals: what it was fitted to.
        prompts: calibration prompts.
        operations: the share of the decoder layers' operations in a full prefill that stays.
        cuts: what the cuts cost, as a share of the same operations without the entry.
        columns, rows: the method's table.
    """

    recipe: str
    entry: int
    method: str
    at: str
    options: Mapping[str, JsonValue]
    goals: Mapping[str, float]
    prompts: int
    operations: float
    cuts: float
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class _Model:
    """The evidence: the recipe without the entry, and the same with trials of it."""

    def __init__(self, recipe: Recipe, entry: int, files: ModelFiles, plan: Plan, calibration: Calibration) -> None:
        self._recipe, self._entry, self._files, self._plan, self._calibration = recipe, entry, files, plan, calibration
        self._whole = _operations(plan)[0]

    @property
    def prompts(self) -> int:
        return self._calibration.prompts

    def look(self, stages: Sequence[Stage], visit: Visit) -> None:
        if self._plan.cuts:
            others = ", ".join(f"decoder.{cut.layer}" for cut in self._plan.cuts)
            raise LegalityError(
                f"{self._recipe.origin(('compress', self._entry))}: fitting looks at the attention of a decoder that nothing else "
                f"cuts, and other entries cut it at {others}; fit this entry in a recipe of its own, then add the others"
            )
        self._calibration.look(stages, visit)

    def divergence(self, at: Site, options: Mapping[str, Option]) -> float:
        return self._calibration.divergence(self._trial(at, options))

    def operations(self, at: Site, options: Mapping[str, Option]) -> float:
        return self.price(self._trial(at, options))[0]

    def price(self, plan: Plan) -> tuple[float, float]:
        """Decoder layers and cuts of a plan, as shares of the decoder layers without the entry."""
        layers, cuts = _operations(plan)
        return layers / self._whole, cuts / self._whole

    def _trial(self, at: Site, options: Mapping[str, Option]) -> Plan:
        return resolve(self._recipe.with_entry(self._entry, str(at), _json(options)), self._files)


def fit_recipe(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    entry: int | None = None,
    goals: Mapping[str, float] | None = None,
    pictures: str | Path | None = None,
    prompts: str | Path | None = None,
    samples: int = SAMPLES,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> FitResult:
    """Fit one entry of a recipe on calibration prompts and write a copy of the recipe with what was found.

    Args:
        recipe: a recipe file, or the name of a shipped recipe.
        out: the file to write; beside the recipe (a shipped one: in the working directory) as `<name>-fitted.yaml` when None.
        entry: which entry of `compress`; may be left out when only one can be fitted.
        goals: what to meet, by the method's names; its defaults where absent.
        pictures: folder of calibration pictures; see `read_questions`.
        prompts: file of questions.
        samples: prompts at most, spread over what there is.
        force: replace `out`.
        progress: called with one line per step.

    Raises:
        RecipeError: the recipe, the entry or a goal is wrong, or `out` exists.
        LegalityError: a goal cannot be met, or the fitted recipe cannot work on its device.
        RuntimeInputError: pictures or questions are missing or cannot be used.
        ModelError: the checkpoint cannot be loaded.
        MissingExtraError: torch or transformers is not installed.
    """
    loaded = load_recipe(recipe)
    target = fitted_target(recipe, out, force)
    index, method = _choose(loaded, entry)
    wanted = _goals(loaded.compress[index].method, method, goals or {})
    questions = spread(read_questions(loaded, pictures, prompts), samples)
    for package in ("torch", "transformers"):
        require(package, extra="export", purpose="fit a recipe")
    from tmc_export.verify.statistics import Calibration

    folder = fetch(loaded, weights=True)
    files = read_model_files(folder)
    plan = resolve(loaded.without_entry(index), files)
    place = loaded.origin(("compress", index))
    if not plan.images:
        raise LegalityError(f"{place}: fitting needs pictures, and the recipe has inputs.images: 0; write 1 or more")
    config = read_options(loaded, index)
    progress(f"load the model, prepare {len(questions)} prompts")
    model = _Model(loaded, index, files, plan, Calibration(folder, plan, files, loaded.inputs.fit, questions))
    evidence: Evidence = model
    progress(f"fit {', '.join(method.fitted)} of {loaded.compress[index].method}")
    try:
        found: Fitted = method.fit(config, plan.facts, evidence, wanted)
    except ValueError as error:
        raise LegalityError(f"{place}: method '{loaded.compress[index].method}' cannot be fitted: {error}") from error
    options = _json(found.options)
    final, _ = make_plan(loaded.with_entry(index, str(found.at), options), files)
    layers, cuts = model.price(final)
    write_fitted(loaded, index, str(found.at), options, target)
    return FitResult(
        recipe=str(target),
        entry=index,
        method=loaded.compress[index].method,
        at=str(found.at),
        options=options,
        goals=wanted,
        prompts=len(questions),
        operations=layers,
        cuts=cuts,
        columns=found.columns,
        rows=found.rows,
    )


def read_questions(recipe: Recipe, pictures: str | Path | None, prompts: str | Path | None) -> list[Question]:
    """Return the calibration prompts.

    Questions are a JSON list of `{"picture": …, "question": …}`, or text with one question a line, each asked about every picture of the
    folder. Without `prompts`, the folder's `questions.json`; without a folder either, the pictures that ship with the checkout whose
    `recipes/` the recipe lies in.

    Raises:
        RuntimeInputError: nothing to ask about, a file that cannot be read, or a picture that does not exist.
    """
    folder = Path(pictures) if pictures is not None else recipe.folder.parent / "examples" / "pictures" if prompts is None else None
    if pictures is None and prompts is None and not (folder is not None and (folder / QUESTIONS).is_file()):
        raise RuntimeInputError(
            "fitting needs calibration pictures, and none ship beside this recipe; give --pictures DIR with a questions.json in it, or "
            "--pictures DIR --prompts FILE"
        )
    if folder is not None and not folder.is_dir():
        raise RuntimeInputError(f"the folder of pictures '{folder}' does not exist; give one with --pictures DIR")
    file = Path(prompts) if prompts is not None else Path(str(folder)) / QUESTIONS
    if not file.is_file():
        how = "check the path" if prompts is not None else "give the questions with --prompts FILE: one a line, asked about every picture"
        raise RuntimeInputError(f"there is no file of questions '{file}'; {how}")
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RuntimeInputError(f"{file} cannot be read as text ({error}); save it as UTF-8") from error
    if text.lstrip().startswith("["):
        return _listed(file, text, folder or file.parent)
    if folder is None:
        raise RuntimeInputError(f"{file} holds questions without pictures; give the folder with --pictures DIR, or write JSON with both")
    return _every(file, text, folder)


def spread(questions: Sequence[Question], samples: int) -> list[Question]:
    """Return at most `samples` prompts, evenly spread over all.

    Raises:
        RuntimeInputError: fewer than one is asked for.
    """
    if samples < 1:
        raise RuntimeInputError(f"--samples is {samples}; fitting needs at least 1 prompt")
    count = min(samples, len(questions))
    return [questions[number * len(questions) // count] for number in range(count)]


def _listed(file: Path, text: str, folder: Path) -> list[Question]:
    from tmc_export.verify.statistics import Question

    try:
        items = json.loads(text)
    except ValueError as error:
        raise RuntimeInputError(f"{file} is not valid JSON ({error}); correct it") from error
    found: list[Question] = []
    for number, item in enumerate(items, start=1):
        pair = (item.get("picture"), item.get("question")) if isinstance(item, dict) else (None, None)
        if not all(isinstance(value, str) and value.strip() for value in pair):
            raise RuntimeInputError(f"{file}: item {number} is {item!r:.60}; write " + '{"picture": "a.png", "question": "what is this"}')
        picture = folder / str(pair[0])
        if not picture.is_file():
            raise RuntimeInputError(f"{file}: item {number} names the picture '{pair[0]}', which is not in {folder}; give --pictures DIR")
        found.append(Question(picture, str(pair[1])))
    return found or _none(file)


def _every(file: Path, text: str, folder: Path) -> list[Question]:
    from tmc_export.verify.statistics import Question

    shown = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    if not shown:
        raise RuntimeInputError(f"no picture ({', '.join(_PICTURES)}) is in {folder}; give another folder with --pictures DIR")
    asked = [line.strip() for line in text.splitlines() if line.strip()]
    return [Question(picture, line) for picture in shown for line in asked] or _none(file)


def _none(file: Path) -> list[Question]:
    raise RuntimeInputError(f"{file} holds 0 questions; write at least 1")


def fitted_target(recipe: str | Path, out: str | Path | None, force: bool) -> Path:
    """Return where a fitted copy of a recipe goes; see `fit_recipe`.

    Raises:
        RecipeError: something is there and may not be replaced, or no file can be made there.
    """
    source = find_recipe(recipe)
    beside = source.parent if Path(recipe).exists() else Path()
    target = beside / f"{source.stem}-fitted.yaml" if out is None else Path(out)
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else f"lies in a folder that does not exist ({target.parent})"
        raise RecipeError(f"the output '{target}' {what}; name a .yaml file with -o")
    if target.exists() and not force:
        raise RecipeError(f"the output '{target}' exists; name another file with -o, or replace it with --force")
    return target


def _choose(recipe: Recipe, entry: int | None) -> tuple[int, type[Method]]:
    """Return the entry to fit, and its method."""
    able = {i: m for i, e in enumerate(recipe.compress) if e.method in METHODS and (m := METHODS.get(e.method)).fitted}
    names = ", ".join(name for name in METHODS if METHODS.get(name).fitted)
    if entry is None and len(able) == 1:
        return next(iter(able.items()))
    if entry is None:
        if not able:
            used = ", ".join(e.method for e in recipe.compress) or "none"
            raise RecipeError(
                f"{recipe.origin(('compress',))}: none of the recipe's methods ({used}) has anything to fit; those that have: {names}"
            )
        listed = ", ".join(f"{i}: {recipe.compress[i].method}" for i in able)
        raise RecipeError(f"{recipe.origin(('compress',))}: {len(able)} entries can be fitted ({listed}); choose one with --entry N")
    if not 0 <= entry < len(recipe.compress):
        raise RecipeError(f"--entry {entry}: the recipe has {len(recipe.compress)} entries in compress; they count from 0")
    if entry not in able:
        raise RecipeError(
            f"{recipe.origin(('compress', entry, 'method'))}: method '{recipe.compress[entry].method}' has nothing to fit; those that "
            f"have: {names}"
        )
    return entry, able[entry]


def _goals(name: str, method: type[Method], given: Mapping[str, float]) -> dict[str, float]:
    for goal, value in given.items():
        if goal not in method.goals:
            raise RecipeError(f"--{goal}: method '{name}' is fitted to {', '.join(f'--{g}' for g in method.goals)}; leave --{goal} out")
        if value <= 0 or (goal == "flops" and value >= 1):
            raise RecipeError(f"--{goal}: {value:g} is no goal; give {'a share between 0% and 100%' if goal == 'flops' else 'more than 0'}")
    return {**method.goals, **given}


def _operations(plan: Plan) -> tuple[int, int]:
    flops = estimate(plan, Clock(None, None), plan.runtime).flops
    return flops["prefill"], flops["cuts"]


def _json(options: Mapping[str, Option]) -> dict[str, JsonValue]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
