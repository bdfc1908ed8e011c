"""`make_plan`: recipe × model × device → a plan that is legal and fits, with its cost, its notes and the uncompressed plan beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tmc_export.core.errors import TmcError
from tmc_export.core.memory import total_bytes
from tmc_export.families._contract import ModelFiles
from tmc_export.graphs._contract import Site
from tmc_export.plan.building import Builder, BuildMemory, build_memory, builder_of, built_on_device, even_splits
from tmc_export.plan.estimate import Amdahl, Clock, Estimate, clock_of, estimate, shares_of
from tmc_export.plan.legality import check_plan, check_target
from tmc_export.plan.memory import GIB, Room, RunMemory, check_run_memory, room_of, run_memory
from tmc_export.plan.notes import notes_of
from tmc_export.plan.resolve import resolve
from tmc_export.plan.stored import check_stored
from tmc_export.plan.types import Plan
from tmc_export.recipe import Device, Recipe, load_device

__all__ = ["PlanReport", "device_settings", "for_this_builder", "make_plan", "report_plan"]


@dataclass(frozen=True)
class PlanReport:
    """A plan with what can be said of it before any weight is read.

    Attributes:
        recipe, device: what it was made for.
        plan: legal and fitting.
        splits: decoder layers at which blocks were cut so that the machine that builds their engines can.
        notes: what a user should know: fallbacks, what has not run, what is not known.
        room: memory on the device; None when unknown.
        run: memory while it runs.
        build: memory while each engine is built.
        builds_here: the engines are built on the device.
        builder: the machine that builds them, whose memory `build` counts against; None without engines, or when unknown.
        clock: the device's figures.
        cost: of the plan.
        uncompressed, uncompressed_cost, uncompressed_run: the same recipe without `compress`; None when that is impossible.
        why_not: why there is no uncompressed plan; else empty.
        amdahl: shares and limits, of the uncompressed plan where there is one.
    """

    recipe: Recipe
    device: Device
    plan: Plan
    splits: tuple[int, ...]
    notes: tuple[str, ...]
    room: Room | None
    run: RunMemory
    build: tuple[BuildMemory, ...]
    builds_here: bool
    builder: Builder | None
    clock: Clock
    cost: Estimate
    uncompressed: Plan | None
    uncompressed_cost: Estimate | None
    uncompressed_run: RunMemory | None
    why_not: str
    amdahl: Amdahl | None


def make_plan(recipe: Recipe, files: ModelFiles, device: Device | None = None) -> tuple[Plan, tuple[int, ...]]:
    """Resolve a recipe and make sure that it can work; what `build` starts from.

    Args:
        recipe: checked against its schema.
        files: the model's JSON files.
        device: the target; loaded by the recipe's name when None.

    Returns:
        The plan, and the decoder layers at which blocks were cut further so that their engines can be built: on the device, or in
        `target.build_memory_gib` (TensorRT-RTX; without it nothing is cut).

    Raises:
        ModelError: the model is not served.
        RecipeError: a method, option or device does not exist.
        LegalityError: it cannot work on this model or device, or does not fit its memory.
    """
    target = device or load_device(recipe.target.device, recipe.folder)
    check_target(recipe, target)
    plan = resolve(recipe, files)
    check_plan(recipe, plan)
    check_stored(recipe, plan, target)
    builder, room = builder_of(recipe, target), room_of(target, recipe.target.runtime)
    splits = () if builder is None else even_splits(plan, recipe, builder)
    if splits:
        plan = resolve(recipe, files, splits)
        check_plan(recipe, plan)
    if room is not None:
        check_run_memory(plan, recipe, room, target)
    return plan, splits


def report_plan(recipe: Recipe, files: ModelFiles, device: Device | None = None) -> PlanReport:
    """Make a plan, reckon its cost, and do the same for the recipe without compression.

    Raises:
        TmcError: as `make_plan`.
    """
    target = device or load_device(recipe.target.device, recipe.folder)
    plan, splits = make_plan(recipe, files, target)
    runtime, tight = recipe.target.runtime, recipe.target.memory_tight
    clock = clock_of(plan, target, runtime)
    full, why = plan if not recipe.compress else None, ""
    if full is None:
        try:
            full = resolve(recipe.model_copy(update={"compress": ()}), files)
        except TmcError as error:
            why = str(error)
    sites = tuple((i, Site.parse(entry.at)) for i, entry in enumerate(recipe.compress))
    room = room_of(target, runtime)
    return PlanReport(
        recipe=recipe,
        device=target,
        plan=plan,
        splits=splits,
        notes=notes_of(recipe, plan, target, room),
        room=room,
        run=run_memory(plan, runtime, tight),
        build=build_memory(plan),
        builds_here=built_on_device(target, runtime),
        builder=builder_of(recipe, target),
        clock=clock,
        cost=estimate(plan, clock, runtime),
        uncompressed=full,
        uncompressed_cost=None if full is None else estimate(full, clock, runtime),
        uncompressed_run=None if full is None else run_memory(full, runtime, tight),
        why_not=why,
        amdahl=None if full is None else shares_of(full, clock, runtime, sites),
    )


def for_this_builder(recipe: Recipe) -> Recipe:
    """Name this machine's memory as that of the machine that builds, where TensorRT-RTX engines are wanted and the recipe names none.

    Whole tenths of a GiB, so that two starts of one machine name the same.
    """
    total = total_bytes()
    if total is None or recipe.target.runtime != "tensorrt-rtx" or recipe.target.build_memory_gib is not None:
        return recipe
    return recipe.with_build_memory(max(total * 10 // GIB, 1) / 10)


def device_settings(name: str) -> tuple[str, ...]:
    """Return the `key=value` settings that bring a recipe to another device: the device, its own runtime, no named capabilities.

    Args:
        name: a shipped device, or a device file (relative to the working directory).

    Raises:
        RecipeError: there is no such device.
    """
    device = load_device(name)
    place = os.fspath(Path(name).resolve()) if "/" in name or name.endswith((".yaml", ".yml")) else name
    runtime = "onnxruntime" if device.tensorrt.flavour == "none" else device.tensorrt.flavour
    return (f"target.device={place}", f"target.runtime={runtime}", "target.compute_capabilities=null")
