"""A plan's subgraphs as modules that run, without a bundle: what calibration answers questions with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tmc_export.api._schemes import Read
from tmc_export.api.eager import EagerBackend, parameter_names
from tmc_export.api.exporter import Exporter, learned_sources
from tmc_export.api.subgraphs import program_of
from tmc_export.bundle.program import Program
from tmc_export.engine import available_bytes
from tmc_export.export.capture import OPSET
from tmc_export.export.materialize import WeightCache
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.types import Plan

__all__ = ["EagerProgram", "eager_program", "weight_budget"]


@dataclass(frozen=True)
class EagerProgram:
    """A plan's subgraphs as modules that run.

    Attributes:
        program: which runs when.
        backend: runs them.
        linears: the model's linears but for its output head, by their weight's name in the checkpoint.
        layers: names of those in the decoder's layers.
        weight: name → float32 weight `[out, in]`.
        weights: per file, identity of a parameter → its name, and where weights are read by that name.
        reads: per file, what reads weights that a scheme may store, where that was asked for.
        identity: name of a weight in the model → in the checkpoint.
    """

    program: Program
    backend: EagerBackend
    linears: Mapping[str, nn.Linear]
    layers: frozenset[str]
    weight: Callable[[str], Tensor]
    weights: Mapping[str, tuple[Mapping[int, str], WeightCache]]
    reads: Mapping[str, Sequence[Read]]
    identity: Callable[[str], str]


def eager_program(
    plan: Plan,
    files: ModelFiles,
    folder: Path,
    config: Any,
    fit: str | None,
    towers: Mapping[str, Path] = MappingProxyType({}),
    budget: int | None = None,
    reads: bool = False,
) -> EagerProgram:
    """Make a plan's subgraphs as modules in float32, unquantized; nothing is written.

    Args:
        plan: what would be exported.
        files: the model's JSON files.
        folder: the model folder with its weights.
        config: its transformers configuration.
        fit: the recipe's picture rule, or None for the family's own.
        towers: folders of the text towers with their weights, by source.
        budget: bytes of weights that may stay in memory between two uses; `weight_budget` when None.
        reads: find out what reads weights; each subgraph is traced for it, otherwise none is.

    Raises:
        ModelError: weights are missing or damaged.
        ExportError: a part cannot be lowered.
    """
    plain = replace(plan, dtype="float32", quantize={})
    work = Exporter(plain, files, folder, config, folder, fit, OPSET, lambda _: None, write=False, trace=reads)
    program = program_of(work, towers)
    for runnable in work.runnables.values():
        _fill_learned(runnable.module)
    names = parameter_names(work.model)
    budget = weight_budget() if budget is None else budget
    cache = WeightCache(work.checkpoint, torch.float32, budget)
    weights: dict[str, tuple[Mapping[int, str], WeightCache]] = dict.fromkeys(work.runnables, (names, cache))
    weights |= {file: (parameter_names(whole), WeightCache(source, torch.float32, budget)) for file, (whole, source) in work.towers.items()}
    backend = EagerBackend(work.runnables, weights)
    linears = {work.checkpoint.identity(names[id(m.weight)]): m for m in _linears(work.model) if m is not work.parts.head}
    layers = frozenset(work.checkpoint.identity(names[id(m.weight)]) for m in _linears(work.parts.layers))
    return EagerProgram(
        program, backend, linears, layers, lambda name: cache.read(names[id(linears[name].weight)]), weights, work.reads,
        work.checkpoint.identity,
    )  # fmt: skip


def weight_budget(caches: int = 1) -> int:
    """Bytes of weights that may stay in memory between two uses in each of so many caches: of a quarter of what is free, or of 1 GiB.

    Each token reads every weight once, in the same order. Where they do not fit, none of them is still there when it is read again.
    """
    return max(1 << 30, (available_bytes() or 0) // 4) // max(1, caches)


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def _fill_learned(module: nn.Module) -> None:
    """Give learned parameters their values: they are small, and stages read them without running a submodule."""
    for place, (source, name) in learned_sources(module).items():
        owner, _, local = place.rpartition(".")
        module.get_submodule(owner).register_parameter(local, nn.Parameter(source.read(name, torch.float32), requires_grad=False))
