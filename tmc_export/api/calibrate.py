"""The calibration of a build: the plan answers the user's questions in float32, and what its linears get says how to round it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.api._schemes import part_of
from tmc_export.api.calibration import Seen, observe
from tmc_export.api.calibration_data import Sample, digest_of
from tmc_export.api.calibration_kv import SlotsSeen, observed_slots, slot_scales
from tmc_export.api.eager_program import EagerProgram, eager_program
from tmc_export.api.eager_session import eager_session
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.quantization import needs_calibration
from tmc_export.plan.types import Plan, QuantizePlan
from tmc_export.quantize._inputs import TOPS
from tmc_export.quantize._weights import is_kept
from tmc_export.quantize.awq import awq_blocks, awq_divisors
from tmc_export.quantize.calibrated import Calibrated
from tmc_export.quantize.clipping import clip_of
from tmc_export.quantize.gptq import gptq_blocks
from tmc_export.quantize.smoothquant import smooth_divisors
from tmc_export.recipe import Calibration, Recipe
from tmc_export.runtime.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["calibrate"]

_PRODUCTS = 2 << 30
"""Bytes of GPTQ's sums in memory at a time: those of a layer of 7 billion weights take 0.7 GB."""
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
    place: Path,
    eager: EagerProgram | None = None,
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
        place: an empty folder, which AWQ's and GPTQ's codes are written to as soon as they are found, and mapped from.
        eager: the plan's subgraphs, where they were traced already.

    Raises:
        RecipeError: a sample does not fit the bundle.
        ModelError: weights are missing or damaged.
    """
    given = recipe.quantize.calibration
    if given is None:
        return Calibrated()
    eager = eager or eager_program(plan, files, folder, config, recipe.inputs.fit, towers)
    schemes = _schemes(plan, eager)
    wanted = {name: eager.linears[name] for name in schemes}
    with eager_session(plan, eager, folder, towers) as session:
        rows = _ROWS if any(s.algorithm == "awq" for s in schemes.values()) else 0
        heads: SlotsSeen = {}
        with observed_slots(eager.backend, heads) if (kept := _slots(plan)) else nullcontext():
            blocks = {name: scheme.block for name, scheme in schemes.items() if scheme.algorithm == "awq"}
            seen = observe(session, samples, wanted, progress, rows=rows, blocks=blocks)
        divisors = _divisors(seen, schemes, eager, progress)
        codes = _awq_codes(seen, divisors, schemes, eager, progress, place)
        smooth = {name: divisors[name] for name, scheme in schemes.items() if scheme.activations is not None and name in divisors}
        if smooth:
            seen = observe(session, samples, wanted, lambda line: progress(f"{line}, smoothed"), divisors=smooth)
        codes |= _gptq_codes(session, samples, seen, schemes, eager, progress, place)
    slots = slot_scales(heads, given.observer, given.percentile_used, kept) if kept else {}
    return Calibrated(_clips(seen, schemes, given), divisors, codes, slots, digest_of(samples), len(samples))


def _slots(plan: Plan) -> str | None:
    """The codes that the slots hold; None: none that need data."""
    kv = plan.quantize.get("kv")
    return kv.weights if kv is not None and needs_calibration("kv", kv) is not None else None


def _schemes(plan: Plan, eager: EagerProgram) -> dict[str, QuantizePlan]:
    """Name of a linear's weight → its scheme, for those that need data."""
    found = {}
    for name in eager.linears:
        part = part_of(name, eager.layers)
        scheme = plan.quantize.get(part)
        if scheme is not None and needs_calibration(part, scheme) and not is_kept(name, scheme.keep):
            found[name] = scheme
    return found


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


def _awq_codes(
    seen: Seen,
    divisors: Mapping[str, Array],
    schemes: Mapping[str, QuantizePlan],
    eager: EagerProgram,
    progress: Callable[[str], None],
    place: Path,
) -> dict[str, tuple[Array, Array]]:
    """AWQ's codes, each block with the range that serves the products best."""
    found: dict[str, tuple[Array, Array]] = {}
    groups = [names for names in seen.groups() if schemes[names[0]].algorithm == "awq"]
    for number, names in enumerate(groups, 1):
        progress(f"awq ranges {number}/{len(groups)}")
        divisor = divisors[names[0]]
        products = seen.blocks[names[0]].numpy()
        parts = divisor.reshape(len(products), -1)
        products = products / (parts[:, :, None] * parts[:, None, :])
        for name in names:
            pair = awq_blocks(products, eager.weight(name).numpy().T * divisor[:, None])
            found[name] = _spilled(place / f"awq-{len(found)}.npy", *pair)
    return found


def _gptq_codes(
    session: Session,
    samples: Sequence[Sample],
    seen: Seen,
    schemes: Mapping[str, QuantizePlan],
    eager: EagerProgram,
    progress: Callable[[str], None],
    place: Path,
) -> dict[str, tuple[Array, Array]]:
    """GPTQ's codes: the samples are answered as often as the products of channels with channels need, `_PRODUCTS` bytes at a time."""
    found: dict[str, tuple[Array, Array]] = {}
    groups = [names for names in seen.groups() if schemes[names[0]].algorithm == "gptq"]
    passes = _passes(groups, {names[0]: 4 * len(seen.inputs[names[0]].peaks) ** 2 for names in groups})
    for number, part in enumerate(passes, 1):
        wanted = {names[0]: eager.linears[names[0]] for names in part}
        told = f"gptq pass {number}/{len(passes)}: "
        sums = observe(session, samples, wanted, lambda line, told=told: progress(told + line), products=list(wanted)).products  # type: ignore[misc]
        for names in part:
            progress(f"{told}{names[0]}")
            products = sums.pop(names[0]).numpy()
            for name in names:
                weight = np.ascontiguousarray(eager.weight(name).numpy().T)
                pair = gptq_blocks(weight, products, schemes[name].block)
                found[name] = _spilled(place / f"gptq-{len(found)}.npy", *pair)
    return found


def _passes(groups: Sequence[tuple[str, ...]], sizes: Mapping[str, int]) -> list[list[tuple[str, ...]]]:
    """Groups whose products fit into memory together, in order; one that does not fit is alone."""
    found: list[list[tuple[str, ...]]] = []
    room = 0
    for names in groups:
        if not found or room < sizes[names[0]]:
            found.append([])
            room = _PRODUCTS
        found[-1].append(names)
        room -= sizes[names[0]]
    return found


def _spilled(path: Path, codes: Array, scales: Array) -> tuple[Array, Array]:
    """Return the arrays, the codes mapped from a file: they stay readable when it is removed."""
    np.save(path, codes, allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False), scales


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
