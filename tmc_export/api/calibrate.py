"""The calibration of a build: the plan answers the user's questions in float32, and what its linears get says how to round it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tmc_export.api._schemes import part_of
from tmc_export.api.calibration import Seen, observe
from tmc_export.api.calibration_data import Sample, digest_of
from tmc_export.api.eager_program import EagerProgram, eager_program
from tmc_export.api.sidecars import copy_sidecars
from tmc_export.bundle.manifest import Manifest
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.quantization import needs_calibration
from tmc_export.plan.types import Plan, QuantizePlan
from tmc_export.quantize._inputs import TOPS
from tmc_export.quantize._weights import is_kept
from tmc_export.quantize.awq import awq_divisors
from tmc_export.quantize.calibrated import Calibrated
from tmc_export.quantize.clipping import clip_of
from tmc_export.quantize.smoothquant import smooth_divisors
from tmc_export.recipe import Calibration, Recipe
from tmc_export.runtime._backend import BackendOptions
from tmc_export.runtime.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["calibrate"]

_ROWS = 512
"""Rows of an input that AWQ compares products on; its official code takes as many."""


def calibrate(
    plan: Plan,
    recipe: Recipe,
    samples: Sequence[Sample],
    files: ModelFiles,
    folder: Path,
    config: Any,
    towers: Mapping[str, Path],
    progress: Callable[[str], None],
) -> Calibrated:
    """Find what the schemes of a plan need data for.

    Args:
        plan: what is built.
        recipe: its calibration.
        samples: read from it.
        files: the model's JSON files.
        folder: the model folder with its weights.
        config: its transformers configuration.
        towers: folders of the text towers with their weights, by source.
        progress: called with one line per sample and pass.

    Raises:
        RecipeError: a sample does not fit the bundle.
        ModelError: weights are missing or damaged.
    """
    given = recipe.quantize.calibration
    if given is None:
        return Calibrated()
    eager = eager_program(plan, files, folder, config, recipe.inputs.fit, towers)
    schemes = _schemes(plan, eager)
    wanted = {name: eager.linears[name] for name in schemes}
    with _session(plan, eager, folder, towers) as session:
        rows = _ROWS if any(s.algorithm == "awq" for s in schemes.values()) else 0
        seen = observe(session, samples, wanted, progress, rows=rows)
        divisors = _divisors(seen, schemes, eager, progress)
        smooth = {name: divisors[name] for name, scheme in schemes.items() if scheme.activations is not None and name in divisors}
        if smooth:
            seen = observe(session, samples, wanted, lambda line: progress(f"{line}, smoothed"), divisors=smooth)
    return Calibrated(_clips(seen, schemes, given), divisors, digest_of(samples), len(samples))


def _schemes(plan: Plan, eager: EagerProgram) -> dict[str, QuantizePlan]:
    """Name of a linear's weight → its scheme, for those that need data."""
    found = {}
    for name in eager.linears:
        part = part_of(name, eager.layers)
        scheme = plan.quantize.get(part)
        if scheme is not None and needs_calibration(part, scheme) and not is_kept(name, scheme.keep):
            found[name] = scheme
    return found


@contextmanager
def _session(plan: Plan, eager: EagerProgram, folder: Path, towers: Mapping[str, Path]) -> Iterator[Session]:
    """The runtime's session on the eager subgraphs."""
    with TemporaryDirectory(prefix="tmc-export-calibrate-") as place:
        copy_sidecars(folder, Path(place) / "model")
        for tower, program in zip(plan.towers, eager.program.towers, strict=True):
            copy_sidecars(towers[tower.source], Path(place) / program.folder)
        manifest = Manifest(name=plan.name, key="", recipe={}, plan={}, checkpoint={}, versions={}, program=eager.program)
        yield Session(Path(place), manifest, eager.backend, BackendOptions())


def _divisors(seen: Seen, schemes: Mapping[str, QuantizePlan], eager: EagerProgram, progress: Callable[[str], None]) -> dict[str, Array]:
    """What inputs are divided by, of SmoothQuant and AWQ."""
    found: dict[str, Array] = {}
    groups = seen.groups()
    for number, names in enumerate(groups, 1):
        scheme, histogram = schemes[names[0]], seen.inputs[names[0]]
        if scheme.smooth is None and scheme.algorithm != "awq":
            continue
        weights = [eager.weight(name).numpy() for name in names]
        if scheme.smooth is not None:
            divisors = smooth_divisors(histogram.peaks, weights, scheme.smooth)
        else:
            progress(f"awq {number}/{len(groups)}")
            divisors = awq_divisors(seen.rows[names[0]].rows, histogram.means, weights, scheme.block)
        found |= dict.fromkeys(names, divisors)
    return found


def _clips(seen: Seen, schemes: Mapping[str, QuantizePlan], given: Calibration) -> dict[str, float]:
    """The end of the range of every input that gets codes; linears that read one input have one."""
    found: dict[str, float] = {}
    for names in seen.groups():
        codes = schemes[names[0]].activations
        if codes is None:
            continue
        levels = int(TOPS[codes])
        clip = clip_of(given.observer, seen.inputs[names[0]], share=given.percentile_used, levels=levels)
        found |= dict.fromkeys(names, clip)
    return found
