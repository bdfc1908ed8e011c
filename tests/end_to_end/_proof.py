"""A recipe proved end to end: build it, let the reference answer conversations, play them through the bundle, count what was compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import tmc_export
from tmc_export.plan.make import make_plan
from tmc_export.plan.source import read_model_files
from tmc_export.plan.types import Plan
from tmc_export.recipe import load_recipe
from tmc_export.runtime.session import Prompt, Session
from tmc_export.verify.compare import Check
from tmc_export.verify.play import play
from tmc_export.verify.record import Script, answer
from tmc_export.verify.recorded import Case, CaseTurn
from tmc_export.verify.reference import Reference
from tmc_export.verify.tolerances import margin_bound, tolerance

__all__ = [
    "HEAD",
    "TABLE",
    "Built",
    "Proof",
    "bucket_differences",
    "build",
    "first_kept",
    "free_run",
    "near_ties",
    "prove",
    "reference_cases",
    "size_ratio",
    "unanswered",
]

TABLE = tolerance("end_to_end", "float32")


@dataclass(frozen=True)
class Built:
    """A bundle with what it was made from."""

    model: Path
    recipe: Path
    folder: Path
    plan: Plan

    def load(self) -> Session:
        """Open it with one thread."""
        return tmc_export.load(self.folder, threads=1)


@dataclass
class Proof:
    """What was compared and what came out.

    Attributes:
        name: of the recipe.
        pairs: conversations with a picture, counted once per picture and question.
        lengths: distinct prompt lengths (text tokens) of first turns.
        steps: steps whose logits were compared, over all routes.
        kept: kept sets compared.
        exceptions: kept sets that differ within the tie margin; everything after them in that conversation was left out.
        near_ties: steps of the reference whose two best logits lie within twice the tolerance.
        distinct: distinct tokens in the reference's answers.
        free: turns in which the bundle, running by itself, said token for token what the reference said.
        free_turns: turns that it was let run by itself.
        failures: checks that failed, and free turns that said something else where there was no near-tie.
        worst: largest logit error relative to the largest logit.
    """

    name: str
    pairs: int = 0
    lengths: int = 0
    steps: int = 0
    kept: int = 0
    exceptions: list[str] = field(default_factory=list)
    near_ties: list[str] = field(default_factory=list)
    distinct: int = 0
    free: int = 0
    free_turns: int = 0
    failures: list[str] = field(default_factory=list)
    worst: float = 0.0

    def count(self, checks: Sequence[Check], cases: Sequence[Case], route: str) -> None:
        """Take in what `play` found."""
        steps = {f"{c.name}/turn {n + 1}/logits": len(t.expected.tokens) for c in cases for n, t in enumerate(c.turns)}
        for check in checks:
            if not check.passed:
                self.failures.append(f"{self.name}, {route}: {check.name}: {check.note}")
            self.exceptions += [f"{self.name}, {route}: {text}" for text in check.exceptions]
            if check.name in steps and check.metrics is not None:
                self.steps += steps[check.name]
                self.worst = max(self.worst, check.metrics.max_rel)
            self.kept += " at " in check.name and not check.name.endswith("/tokens")

    def row(self) -> str:
        """One line of a Markdown table; `HEAD` is its head."""
        counts = f"| {self.name} | {self.pairs} | {self.lengths} | {self.free} of {self.free_turns} | {self.steps} | {self.worst:.1e}"
        return f"{counts} | {self.kept} | {len(self.exceptions)} | {len(self.near_ties)} | {self.distinct} | {len(self.failures)} |"


HEAD = (
    "| recipe | pairs | prompt lengths | turns token for token | logit steps | worst relative | kept sets | ties | near-ties | "
    "distinct tokens | failures |\n|" + "---|" * 11
)


CPU = {"device": "cpu", "runtime": "onnxruntime"}


def write_recipe(
    folder: Path,
    name: str,
    model: Path,
    compress: Sequence[str] = (),
    inputs: Mapping[str, Any] | None = None,
    target: Mapping[str, str] = MappingProxyType(CPU),
) -> Path:
    """Write a float32 recipe."""
    given = {"images": 1, "text_tokens": 32, "new_tokens": 16, **(inputs or {})}
    lines = ["recipe: 1", f"name: {name}", f"model: {{source: {model}, dtype: float32}}"]
    lines += ["inputs: {" + ", ".join(f"{k}: {v}" for k, v in given.items()) + "}"]
    lines += ["compress:", *(f"  - {entry}" for entry in compress)] if compress else []
    path = folder / f"{name}.yaml"
    lines.append("target: {" + ", ".join(f"{k}: {v}" for k, v in target.items()) + "}")
    path.write_text("\n".join([*lines, ""]), "utf-8")
    return path


def build(
    folder: Path,
    name: str,
    model: Path,
    compress: Sequence[str] = (),
    inputs: Mapping[str, Any] | None = None,
    target: Mapping[str, str] = MappingProxyType(CPU),
) -> Built:
    """Build a bundle without recorded answers."""
    recipe = write_recipe(folder, name, model, compress, inputs, target)
    tmc_export.build(recipe, folder / name, record=False, engines=False)
    plan, _ = make_plan(load_recipe(recipe), read_model_files(model))
    return Built(model, recipe, folder / name, plan)


def reference_cases(built: Built, scripts: Sequence[Script], steps: int) -> list[Case]:
    """Let the reference answer."""
    reference = Reference(built.model, built.plan)
    return [answer(reference, script, built.plan, steps) for script in scripts]


def lay_out(session: Session, turn: CaseTurn) -> Prompt:
    """Encode a turn's pictures and lay out its tokens."""
    return session.prompt(turn.ids, [(b, p[None].astype(session.program.dtype)) for b, p in zip(turn.buckets, turn.pixels, strict=True)])


def first_kept(session: Session, turn: CaseTurn, route: str = "auto") -> dict[tuple[int, int], tuple[int, ...]]:
    """What a first turn keeps at every cut: (block, stage) → the live places."""
    session.reset()
    trace = session.run_prompt(lay_out(session, turn), route)  # type: ignore[arg-type]
    return {where: tuple(int(p) for p in places if p >= 0) for where, places in trace.kept.items()}


def near_ties(logits: Any) -> Any:
    """Steps `[t]` whose two best logits lie within twice the tolerance: rounding may choose."""
    best = np.sort(logits, -1)
    result = best[:, -1] - best[:, -2] <= 2 * (TABLE.atol + TABLE.rtol * float(np.abs(logits).max()))
    return np.flatnonzero(result)


def free_run(session: Session, case: Case) -> list[tuple[int, ...]]:
    """Let the bundle answer by itself, as many tokens a turn as the reference did; a later turn begins with its own last token."""
    session.reset()
    said: list[tuple[int, ...]] = []
    for turn in case.turns:
        ids = (said[-1][-1], *turn.ids[1:]) if said else turn.ids
        logits = session.run_prompt(lay_out(session, replace(turn, ids=ids))).logits
        tokens = [int(logits.argmax())]
        while len(tokens) < len(turn.expected.tokens):
            tokens.append(int(session.decoder.step(tokens[-1]).argmax()))
        said.append(tuple(tokens))
    return said


def _free(proof: Proof, session: Session, cases: Sequence[Case]) -> None:
    """Compare free answers; behind a near-tie or a tied kept set the two may part, elsewhere not."""
    for case in cases:
        ties = {number: set(near_ties(t.expected.logits).tolist()) for number, t in enumerate(case.turns)}
        excused = any(f"{case.name}/turn" in text for text in proof.exceptions)
        for number, (got, turn) in enumerate(zip(free_run(session, case), case.turns, strict=True)):
            proof.free_turns += 1
            want = turn.expected.tokens
            proof.near_ties += [f"{proof.name}: {case.name}/turn {number + 1}, step {step}" for step in sorted(ties[number])]
            proof.free += got == want
            if got == want:
                continue
            parted = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
            if parted not in ties[number] and not excused:
                proof.failures.append(f"{proof.name}: {case.name}/turn {number + 1} says {got}, the reference {want}")
            break


def prove(built: Built, scripts: Sequence[Script], steps: int = 8, routes: Sequence[str] = ("auto", "chunked")) -> tuple[Proof, list[Case]]:
    """Compare a bundle with the reference on conversations, along each route, and let it answer by itself."""
    cases = reference_cases(built, scripts, steps)
    session = built.load()
    proof = Proof(built.recipe.stem)
    for route in routes:
        proof.count(play(session, cases, TABLE, "float32", route), cases, route)  # type: ignore[arg-type]
    _free(proof, session, cases)
    turns = [t for c in cases for t in c.turns]
    proof.pairs = sum(bool(t.pixels) for t in turns)
    proof.lengths = len({len(c.turns[0].ids) for c in cases if c.turns[0].pixels})
    proof.distinct = len({token for t in turns for token in t.expected.tokens})
    return proof, cases


def size_ratio(built: Built) -> float:
    """Bytes of the bundle's `onnx/` ÷ bytes of the checkpoint's weights."""
    weights = sum(p.stat().st_size for p in built.model.glob("*.safetensors"))
    return sum(p.stat().st_size for p in (built.folder / "onnx").rglob("*") if p.is_file()) / weights


def unanswered(script: Script) -> CaseTurn:
    """A script's first turn, whose answer nobody asks for."""
    pictures, ids = script.turns[0]
    return CaseTurn(tuple(p for _, p in pictures), tuple(b for b, _ in pictures), ids, expected=None)  # type: ignore[arg-type]


def bucket_differences(small: Built, large: Built, scripts: Sequence[Script]) -> tuple[list[str], list[str]]:
    """Compare what first turns keep in two buckets, whole and chunked; returns what differs, and what differs within the tie margin."""
    one, two = small.load(), large.load()
    wrong: list[str] = []
    ties: list[str] = []
    for script in scripts:
        turn = unanswered(script)
        wanted = first_kept(one, turn, "whole")
        others = {"whole, large bucket": first_kept(two, turn, "whole"), "chunked, large bucket": first_kept(two, turn, "chunked")}
        others["chunked"] = first_kept(one, turn, "chunked")
        for route, got in others.items():
            if got != wanted:
                (ties if _tied(small, script) else wrong).append(f"{small.recipe.stem}: {script.name} keeps something else, {route}")
    return wrong, ties


def _tied(built: Built, script: Script) -> bool:
    """Ask the reference whether a kept set of this turn is within rounding."""
    (case,) = reference_cases(built, [script], 1)
    return any(s.tied(margin_bound("float32")) for s in case.turns[0].expected.stages)
