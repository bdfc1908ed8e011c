"""A plan as tables for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from tmc_export.plan.estimate import LABEL
from tmc_export.plan.memory import gib

if TYPE_CHECKING:
    from tmc_export.plan.estimate import Estimate
    from tmc_export.plan.make import PlanReport
    from tmc_export.plan.memory import RunMemory

__all__ = ["show"]


def show(report: PlanReport) -> None:
    """Print a report to standard output."""
    console = Console(file=sys.stdout, highlight=False, markup=False, soft_wrap=False, width=None if sys.stdout.isatty() else 140)
    plan, target = report.plan, report.recipe.target
    console.print(f"{plan.name} on {report.device.product} ({report.device.name}), runtime {target.runtime}, {plan.dtype}")
    console.print(
        f"{plan.facts.architecture}: {plan.images} picture(s), {plan.text_tokens} text tokens, {plan.new_tokens} new tokens in a "
        "conversation"
    )
    marks = "; ~ uses unverified figures of the device" if report.clock.unverified else ""
    side = ("attention rows that cuts compute on the side", _sides(report)) if any(c.scores or c.adding for c in report.cost.cuts) else ()
    parts = ("\ntokens of one picture", _stages(report), "decoder", _blocks(report), *side, f"{LABEL}{marks}", _compared(report))
    console.print(*parts, sep="\n")
    for line in (*_speedups(report), *_amdahl(report), *_memory(report), *(f"note: {note}" for note in report.notes)):
        console.print(line, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    return table


def _stages(report: PlanReport) -> Table:
    """Tokens in and out of everything that a picture goes through, then of the whole sequence."""
    table = _table("where", "method", "in", "out")
    for tower in report.plan.towers:
        table.add_row(f"text tower {tower.index}: {tower.source}", "the turn's question", str(tower.tokens), "1")
    for vision in report.plan.vision:
        size = f"{vision.size[0]}x{vision.size[1]} pixels"
        table.add_row(f"picture {vision.index}: {size}", "encoder and projector", str(vision.facts.encoder.tokens), str(vision.tokens))
        for stage in vision.stages:
            unit = " pixels" if stage.stage.at.part == "input" else ""
            table.add_row(f"  {stage.stage.at}", stage.method, f"{stage.before.tokens}{unit}", f"{stage.after.tokens}{unit}")
    for cut in report.plan.cuts:
        for stage in cut.stages:
            joint = " (joint)" if stage.scope == "joint" else ""
            table.add_row(f"  {stage.stage.at}", f"{stage.method}{joint}", str(stage.before.tokens), str(stage.after.tokens))
    return table


def _blocks(report: PlanReport) -> Table:
    table = _table("block", "layers", "prompt tokens", "slots", "KV", "prefill GFLOP", "engine build peak")
    peaks = {engine.name: engine.peak for engine in report.build}
    built = report.recipe.target.runtime != "onnxruntime"
    for block in report.plan.blocks:
        cost = report.cost
        split = " (split to be built)" if block.first in report.splits else ""
        table.add_row(
            f"block_{block.index}",
            f"{block.first} to {block.last - 1}{split}",
            str(block.tokens),
            str(block.capacity),
            gib(cost.kv_bytes[block.index]),
            _giga(cost.blocks_flops[block.index]),
            gib(peaks[f"block_{block.index}"]) if built else "-",
        )
    return table


def _sides(report: PlanReport) -> Table:
    """What cuts compute to score tokens: query rows of a layer against its keys, and the projections of a layer to come."""
    table = _table("cut", "scores with", "query rows", "keys", "rows GFLOP", "q/k once more GFLOP")
    for cut, cost in zip(report.plan.cuts, report.cost.cuts, strict=True):
        if cut.summed:
            where = f"layer {cut.layer - 1}, the map of its own attention"
            table.add_row(f"block_{cut.before_block - 1}", where, str(cost.summed[0]), str(cost.summed[1]), _giga(cost.adding), "-")
        for layer, (rows, keys), again in ((cut.layer - 1, cost.previous, 0), (cut.layer, cost.following, cost.duplicated)):
            if rows:
                share = cost.scores * rows * keys // (cost.previous[0] * cost.previous[1] + cost.following[0] * cost.following[1])
                side = "before" if layer < cut.layer else "after"
                name = f"compress_{cut.before_block}"
                table.add_row(name, f"layer {layer}, {side} it", str(rows), str(keys), _giga(share), _giga(again) if again else "-")
    return table


def _compared(report: PlanReport) -> Table:
    """The plan beside the same recipe without compression."""
    full, full_run = report.uncompressed_cost, report.uncompressed_run
    marks = " ~" if report.clock.unverified else ""
    table = _table("", "unit", "this plan", "uncompressed")

    sides = [(report.cost, report.run)] + ([(full, full_run)] if full is not None and full_run is not None else [])

    def row(name: str, unit: str, show: Callable[[Estimate, RunMemory], str]) -> None:
        table.add_row(name, unit, *(show(cost, run) for cost, run in sides), *(["-"] if len(sides) == 1 else []))

    for part in report.cost.flops:
        row(f"operations, {part}" + (" (one token)" if part == "decode" else ""), "GFLOP", partial(_part, part))
    if report.cost.duplicated_flops:
        row("  of cuts: q/k computed once more", "GFLOP", lambda cost, _: _giga(cost.duplicated_flops))
    row("weights stored", "", lambda cost, _: gib(cost.weights.total))
    row("KV slots", "", lambda cost, _: gib(sum(cost.kv_bytes)))
    row("memory while running", "", lambda _, run: gib(run.total))
    row("graph launches per prompt", "", lambda cost, _: str(cost.prompt_dispatches))
    row("graph launches per token", "", lambda cost, _: str(cost.token_dispatches))
    row("first token", f"ms{marks}", lambda cost, _: _milli(cost.first_token_s))
    row("each token", f"ms{marks}", lambda cost, _: _milli(cost.token_s))
    row(f"answer of {report.plan.new_tokens} tokens", f"ms{marks}", lambda cost, _: _milli(cost.answer_s))
    return table


def _speedups(report: PlanReport) -> list[str]:
    cost, full = report.cost, report.uncompressed_cost
    if full is None:
        return [f"no uncompressed plan to compare with: {report.why_not}"]
    lines = [f"prompt operations: {full.prompt_flops / cost.prompt_flops:.2f}x fewer than uncompressed"]
    if cost.first_token_s and cost.token_s and cost.answer_s and full.first_token_s and full.token_s and full.answer_s:
        lines.append(
            f"speed-up, estimated: first token {full.first_token_s / cost.first_token_s:.2f}x, each token "
            f"{full.token_s / cost.token_s:.2f}x, "
            f"answer {full.answer_s / cost.answer_s:.2f}x"
        )
    else:
        lines.append(f"no times: {report.clock.why_not}")
    if report.clock.unverified:
        lines.append(f"unverified figures of the device: {', '.join(report.clock.unverified)}")
    return lines


def _amdahl(report: PlanReport) -> list[str]:
    found = report.amdahl
    if found is None:
        return []
    lines = [
        f"shares of an uncompressed answer, by {found.basis}: encoder {found.encoder:.1%}, prefill {found.prefill:.1%}, decode "
        f"{found.decode:.1%}"
    ]
    for index, site, first, answer in found.limits:
        lines.append(
            f"the most that compression at {site} (entry {index}) could win, with every visual token gone there at no cost: "
            f"first token {first:.2f}x, answer {answer:.2f}x"
        )
    return lines


def _memory(report: PlanReport) -> list[str]:
    run, room = report.run, report.room
    lines = [
        f"memory while running: {_parts(run)}" + ("" if room is None else f"; the device leaves {gib(room.free)} of {gib(room.total)}")
    ]
    if report.recipe.target.runtime != "onnxruntime":
        worst = max(report.build, key=lambda engine: engine.peak)
        where = "on the device" if report.builds_here else "on the machine that builds"
        has = "" if report.builder is None else f"; it has {report.builder.room}"
        lines.append(f"memory while engines are built, {where}, one after the other: up to {gib(worst.peak)} ({worst.name}){has}")
    return lines


def _parts(run: RunMemory) -> str:
    copies = f" ({run.copies} copies of the decoder's)" if run.copies > 1 else ""
    return f"{gib(run.total)}: weights {gib(run.weights)}{copies}, KV {gib(run.kv)}, activations {gib(run.activations)}"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.1f}" if flops >= 1e9 or not flops else f"{flops / 1e9:.4f}"


def _part(part: str, cost: Estimate, _: RunMemory) -> str:
    return _giga(cost.flops.get(part, 0))


def _milli(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1e3:,.2f}"
