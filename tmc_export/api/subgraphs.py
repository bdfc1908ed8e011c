"""Plan → the static subgraphs of `onnx/`, the symbolic blocks of `engines/`, and the program that says when each runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tmc_export.api.exporter import Exporter, Progress
from tmc_export.api.resuming import step
from tmc_export.bundle.journal import Journal
from tmc_export.bundle.program import BlockProgram, CutProgram, GraphPhase, PhaseName, Program, TowerProgram, VisionProgram
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.types import Plan
from tmc_export.quantize.calibrated import Calibrated

__all__ = ["Exported", "export_subgraphs", "program_of"]


@dataclass(frozen=True)
class Exported:
    """What `export_subgraphs` made: the program, and per block the shapes of its phases for the engine builder."""

    program: Program
    profiles: list[dict[str, Any]]


def export_subgraphs(
    plan: Plan,
    files: ModelFiles,
    folder: Path,
    config: Any,
    out: Path,
    fit: str | None,
    opset: int,
    progress: Progress,
    towers: Mapping[str, Path] = MappingProxyType({}),
    found: Calibrated | None = None,
    journal: Journal | None = None,
) -> Exported:
    """Export every subgraph of a plan.

    Args:
        plan: what to export.
        files: the model's JSON files.
        folder: the model folder with its weights.
        config: its transformers configuration.
        out: the bundle's (temporary) folder; `onnx/` and `engines/` are made in it.
        fit: the recipe's picture rule, or None for the family's own.
        opset: ONNX opset of the graphs.
        progress: called with the name of each subgraph before it is made.
        towers: folders of the text towers with their weights, by source.
        found: what calibration found, where a scheme needs data.
        journal: of `out`: what it says is finished is not made again.

    Raises:
        ModelError: weights are missing or damaged.
        LegalityError: the plan's slots are codes, and no scales are given.
        ExportError: a part cannot be lowered, or scales do not belong to the plan.
    """
    work = Exporter(plan, files, folder, config, out, fit, opset, progress, found, journal=journal)
    return Exported(program_of(work, towers), work.profiles)


def program_of(work: Exporter, towers: Mapping[str, Path]) -> Program:
    """Make every subgraph, and the program that says when each runs."""
    plan, files = work.plan, work.files
    texts = tuple(step(work, f"tower_{t.index}", TowerProgram, partial(work.tower, t, towers[t.source])) for t in plan.towers)
    vision = tuple(step(work, f"vision_{v.index}", VisionProgram, partial(work.vision, v)) for v in plan.vision)
    embed = step(work, "embed", dict[PhaseName, GraphPhase], work.embed)
    blocks = tuple(step(work, f"block_{b.index}", BlockProgram, partial(work.block, b)) for b in plan.blocks)
    cuts = tuple(step(work, f"cut_{c.before_block}", CutProgram, partial(work.cut, c)) for c in plan.cuts)
    work.schemes.finish()
    d, rules = plan.facts.decoder, work.family.tokens(files)
    return Program(
        family=plan.facts.family, dtype="float16" if plan.dtype == "float16" else "float32", batch=plan.batch, images=plan.images,
        width=d.width, vocabulary=d.vocabulary, heads=d.heads, kv_heads=d.kv_heads, head_dim=d.head_dim, rope_axes=d.rope_axes,
        position_rule=work.family.position_rule(files), text_tokens=plan.text_tokens, new_tokens=plan.new_tokens,
        chunk=plan.chunk, turns=plan.turns, memory_tight=plan.memory_tight,
        image_token=rules.image, image_text=rules.image_text, eos=rules.eos, vision=vision, embed=embed, blocks=blocks, cuts=cuts,
        towers=texts, kv=work.kv,
    )  # fmt: skip
