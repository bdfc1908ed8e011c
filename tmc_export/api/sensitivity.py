"""What a recipe's quantization does to answers, without building it: all of it, or one layer at a time.

The recipe's questions (`quantize.calibration`), or others, are answered by the plan's subgraphs in PyTorch (`simulation`): in float32, then
with some weights rounded, end to end and with every choice of a selection held as it was in float32. The difference of the two is what the
rounded selection does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tmc_export.api.bundling import open_config
from tmc_export.api.calibrate import calibrate
from tmc_export.api.calibration_data import Sample, read_samples, samples_of
from tmc_export.api.eager_program import EagerProgram, eager_program
from tmc_export.api.eager_session import eager_session
from tmc_export.api.measuring import Compared, Effect, Measuring, effect_of
from tmc_export.api.score_inputs import ScoreInput, score_inputs
from tmc_export.api.simulation import Simulation
from tmc_export.api.subgraph_noise import SubgraphNoise
from tmc_export.api.units import By, Unit, units_of
from tmc_export.core.errors import RecipeError
from tmc_export.core.lazy import require
from tmc_export.plan.make import make_plan
from tmc_export.plan.source import fetch, read_model_files
from tmc_export.plan.towers import fetch_towers
from tmc_export.plan.types import Plan
from tmc_export.quantize.calibrated import Calibrated
from tmc_export.recipe import Recipe, load_recipe
from tmc_export.surgery.replay import Kind

if TYPE_CHECKING:
    from tmc_export.families._contract import ModelFiles

__all__ = ["TOKENS", "Bench", "Explained", "Measured", "Row", "explain", "measure", "open_bench", "questions_of"]

TOKENS = 8
"""Tokens of an answer, unless asked for another number."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What the whole quantization of a recipe does, question by question.

    Attributes:
        samples: the questions.
        end_to_end: each answer beside float32's, selections free.
        frozen: the same with choices held; None where nothing can be held: the recipe selects and merges nothing.
        kinds: stage → what is held of it: `rows` kept, a `mix` of rows, or `none`: its weights are learned, or it is no linear map.
        sqnr_db: subgraph → output → signal to noise in dB on float32's inputs, choices held; see `SubgraphNoise.sqnr_db`.
    """

    samples: tuple[Sample, ...]
    end_to_end: tuple[Compared, ...]
    frozen: tuple[Compared, ...] | None
    kinds: Mapping[str, Kind]
    sqnr_db: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """What a unit does alone, all else in float32.

    Attributes:
        unit: what is rounded.
        end_to_end, frozen: as in `Measured`, over all questions.
    """

    unit: Unit
    end_to_end: Effect
    frozen: Effect | None


@dataclass(frozen=True)
class Explained:
    """What hurts.

    Attributes:
        recipe: its name.
        dtype: of the plan: what is not rounded is reckoned in float32 all the same.
        by: what the rows are.
        rows: the worst first, by the KL divergence end to end.
        total: everything together, whole answers.
        samples: questions.
        tokens: of an answer, at most.
        answers: whether the rows' answers were decoded, or their first tokens only.
        kinds, sqnr_db: as in `Measured`.
        scores: what the stages score with.
        kept: part → words that the recipe keeps.
    """

    recipe: str
    dtype: str
    by: By
    rows: tuple[Row, ...]
    total: Row
    samples: int
    tokens: int
    answers: bool
    kinds: Mapping[str, Kind]
    sqnr_db: Mapping[str, Mapping[str, float]]
    scores: tuple[ScoreInput, ...]
    kept: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Model:
    """What does not change with a recipe's `keep`: the model, and its subgraphs in float32."""

    files: ModelFiles
    folder: Path
    config: Any
    towers: Mapping[str, Path]
    eager: EagerProgram


class Bench:
    """A recipe's quantization, calibrated, and questions answered in float32.

    Attributes:
        recipe, plan, simulation, measuring: of the recipe.
        samples: the questions.
        calibrated: what calibration found.
    """

    def __init__(self, recipe: Recipe, plan: Plan, model: _Model, measuring: Measuring, calibrated: Calibrated, progress: Progress) -> None:
        self.recipe, self.plan, self.simulation, self.measuring = recipe, plan, measuring.simulation, measuring
        self.samples, self.calibrated = measuring.samples, calibrated
        self._model, self._progress = model, progress

    def everything(self) -> tuple[str, ...]:
        """Names of all that the recipe rounds."""
        return tuple(name for unit in units_of(self.simulation, "part") for name in unit.names)

    def noise(self) -> dict[str, dict[str, float]]:
        """Return what rounding everything does to each subgraph on float32's inputs; see `SubgraphNoise.sqnr_db`."""
        backend = SubgraphNoise(self.simulation, self.everything())
        with eager_session(self.plan, self._model.eager, self._model.folder, self._model.towers, backend) as session:
            for number, sample in enumerate(self.samples, 1):
                self._progress(f"subgraph by subgraph {number}/{len(self.samples)}")
                session.generate([str(p) for p in sample.images], sample.prompt, chat=session.template is not None, max_new_tokens=1)
        return backend.sqnr_db()

    def check(self, keep: Mapping[str, Sequence[str]]) -> None:
        """Make sure that the recipe has a plan with other words in `keep`.

        Raises:
            LegalityError: it has none.
        """
        make_plan(self.recipe.with_keep(keep), self._model.files)

    @contextmanager
    def with_keep(self, keep: Mapping[str, Sequence[str]], tokens: int) -> Iterator[Bench]:
        """Open the same bench with other words in the recipe's `keep`, calibrated anew."""
        with self.with_recipe(self.recipe.with_keep(keep), tokens) as bench:
            yield bench

    @contextmanager
    def with_recipe(self, recipe: Recipe, tokens: int) -> Iterator[Bench]:
        """Open the same bench for a recipe that differs in `quantize` alone, calibrated anew; float32's answers stay.

        Raises:
            ValueError: it differs in what float32 answers.
        """
        if [recipe.model, recipe.inputs, recipe.compress] != [self.recipe.model, self.recipe.inputs, self.recipe.compress]:
            raise ValueError(f"the recipe {recipe.name} differs from {self.recipe.name} in more than quantize; open a bench of its own")
        plan, _ = make_plan(recipe, self._model.files)
        with _calibrated(recipe, plan, self._model, self.samples, tokens, self._progress, self.measuring) as bench:
            yield bench

    def row(self, unit: Unit, answers: bool) -> Row:
        """Measure one unit alone."""
        free, held = self.measuring.both(unit.names, answers=answers)
        return Row(unit, effect_of(free), None if held is None else effect_of(held))


def questions_of(
    recipe: Recipe, samples: int | None = None, images: str | Path | None = None, prompts: str | Path | None = None
) -> list[Sample]:
    """Return what to ask: the recipe's calibration data, or a file of prompts.

    Args:
        recipe: may have `quantize.calibration`.
        samples: questions at most; all of them (the recipe's: as many as it says) when None.
        images: folder of pictures for `prompts`.
        prompts: one JSON object a line; see `read_samples`.

    Raises:
        RecipeError: there are none, or they cannot be read.
    """
    given = recipe.quantize.calibration
    if prompts is None:
        if images is not None:
            raise RecipeError(f"--images {images} needs questions about the pictures; give --prompts FILE, one JSON object a line")
        if given is None:
            raise RecipeError(
                f"{recipe.origin(('quantize',))}: there is nothing to measure with: the recipe has no quantize.calibration; give "
                "--prompts FILE.jsonl and --images DIR"
            )
        found = samples_of(recipe)
        return found if samples is None else found[:samples]
    if recipe.inputs.images and images is None:
        raise RecipeError(f"--prompts {prompts}: the recipe takes pictures; give their folder with --images DIR")
    try:
        return read_samples(Path(prompts), None if images is None else Path(images), samples or 1 << 20, recipe.inputs.images)
    except RecipeError as error:
        text = str(error).replace("quantize.calibration.prompts", "--prompts").replace("quantize.calibration.images", "--images")
        raise RecipeError(text) from error


@contextmanager
def open_bench(
    recipe: str | Path | Recipe, samples: Sequence[Sample] | None = None, *, tokens: int = TOKENS, progress: Progress = lambda _: None
) -> Iterator[Bench]:
    """Calibrate a recipe as a build would, and answer questions in float32.

    Args:
        recipe: a recipe file, the name of a shipped recipe, or a loaded recipe.
        samples: the questions; those of `quantize.calibration` when None.
        tokens: of an answer, at most.
        progress: called with one line per step.

    Raises:
        RecipeError: the recipe quantizes nothing, or there are no questions, or one does not fit.
        LegalityError: the recipe cannot work on its model or device.
        ModelError: weights are missing or damaged.
        MissingExtraError: torch or transformers is not installed.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    parts = [part for part in ("encoder", "projector", "decoder", "head", "kv") if loaded.quantize.part(part) is not None]
    if not parts:
        raise RecipeError(
            f"{loaded.origin(('quantize',))}: the recipe quantizes nothing, so that there is nothing to measure; name a part, such as "
            "quantize: {decoder: {weights: int8}}"
        )
    asked = questions_of(loaded) if samples is None else list(samples)
    for package in ("torch", "transformers"):
        require(package, extra="export", purpose="measure quantization")
    plan, model = _open(loaded, progress)
    with _calibrated(loaded, plan, model, asked, tokens, progress) as bench:
        yield bench


@contextmanager
def _calibrated(
    recipe: Recipe,
    plan: Plan,
    model: _Model,
    samples: Sequence[Sample],
    tokens: int,
    progress: Progress,
    before: Measuring | None = None,
) -> Iterator[Bench]:
    with TemporaryDirectory(prefix="tmc-export-codes-", ignore_cleanup_errors=True) as place:  # Windows removes no file that is mapped
        found = calibrate(
            plan, recipe, samples_of(recipe), model.files, model.folder, model.config, model.towers, progress, Path(place), model.eager
        )
    simulation = Simulation(plan, model.eager, found)
    if not simulation.targets and not simulation.slots:
        raise RecipeError(f"{recipe.origin(('quantize',))}: keep leaves nothing to quantize, so that there is nothing to measure")
    with eager_session(plan, model.eager, model.folder, model.towers, simulation.backend) as session:
        measuring = Measuring(session, simulation, samples, tokens, True, progress, before)
        yield Bench(recipe, plan, model, measuring, found, progress)


def _open(recipe: Recipe, progress: Progress) -> tuple[Plan, _Model]:
    folder = fetch(recipe, weights=True)
    files = read_model_files(folder)
    plan, _ = make_plan(recipe, files)
    towers = fetch_towers(recipe, plan)
    progress("trace the subgraphs")
    config = open_config(folder)
    return plan, _Model(files, folder, config, towers, eager_program(plan, files, folder, config, recipe.inputs.fit, towers, reads=True))


def measure(
    recipe: str | Path | Recipe, samples: Sequence[Sample] | None = None, *, tokens: int = TOKENS, progress: Progress = lambda _: None
) -> Measured:
    """Measure a recipe's whole quantization, question by question: end to end, with choices held, and subgraph by subgraph.

    Args:
        recipe: a recipe file, the name of a shipped recipe, or a loaded recipe.
        samples: the questions; those of `quantize.calibration` when None.
        tokens: of an answer, at most.
        progress: called with one line per step.

    Raises:
        TmcError: as `open_bench`.
    """
    with open_bench(recipe, samples, tokens=tokens, progress=progress) as bench:
        progress("everything rounded")
        free, held = bench.measuring.both(bench.everything(), answers=True)
        kinds = dict(bench.measuring.kinds)
        return Measured(bench.samples, tuple(free), None if held is None else tuple(held), kinds, bench.noise())


def explain(
    recipe: str | Path | Recipe,
    samples: Sequence[Sample] | None = None,
    *,
    by: By = "layer",
    answers: bool = False,
    tokens: int = TOKENS,
    progress: Progress = lambda _: None,
) -> Explained:
    """Find what hurts: every unit of a recipe rounded alone, then everything.

    Args:
        recipe: as `open_bench`.
        samples: as `open_bench`.
        by: what a row is; see `units_of`.
        answers: decode the rows' answers, too; without it their first tokens are compared.
        tokens: of an answer, at most.
        progress: called with one line per step.
    """
    with open_bench(recipe, samples, tokens=tokens, progress=progress) as bench:
        units = units_of(bench.simulation, by)
        rows = []
        for number, unit in enumerate(units, 1):
            progress(f"{unit.part} {unit.label} ({number}/{len(units)})")
            rows.append(bench.row(unit, answers))
        progress("everything rounded")
        total = bench.row(Unit("", "everything", bench.everything(), ()), True)
        rows.sort(key=lambda row: -row.end_to_end.kl)
        return Explained(
            recipe=bench.recipe.name,
            dtype=bench.plan.dtype,
            by=by,
            rows=tuple(rows),
            total=total,
            samples=len(bench.samples),
            tokens=tokens,
            answers=answers,
            kinds=dict(bench.measuring.kinds),
            sqnr_db=bench.noise(),
            scores=tuple(score_inputs(bench.plan, bench.simulation)),
            kept={part: scheme.keep for part, scheme in bench.plan.quantize.items() if scheme.keep},
        )
