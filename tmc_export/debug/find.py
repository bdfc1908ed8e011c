"""Which subgraph of a bundle fails on onnxruntime, and where in it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmc_export.bundle.manifest import Manifest
from tmc_export.bundle.read import open_manifest, path_in
from tmc_export.bundle.write import hash_file
from tmc_export.core.errors import BundleError, ParityError, RuntimeInputError
from tmc_export.core.registry import nearest
from tmc_export.debug.differ import bound, compare
from tmc_export.debug.fault import Fault
from tmc_export.debug.feeds import Capture, running_order
from tmc_export.debug.graph import execute, load_graph, refused
from tmc_export.debug.localise import locate_difference, locate_refusal, workspace_of
from tmc_export.runtime._backend import BackendOptions, open_backend, options_for
from tmc_export.runtime.session import Session
from tmc_export.verify.compare import Check
from tmc_export.verify.ladder import precision_of_manifest
from tmc_export.verify.play import Player, play
from tmc_export.verify.recorded import read_cases
from tmc_export.verify.tolerances import Tolerance, tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Verdict", "find"]

UNOPTIMISED = "the same graph without onnxruntime's optimizations"


def _options(manifest: Manifest) -> BackendOptions:
    """As a session's, int4 weights multiplied as on a device."""
    return BackendOptions(int4_accuracy=1, phases=options_for(manifest.program).phases)


@dataclass(frozen=True)
class Verdict:
    """What a search ended with.

    Attributes:
        fault: None when nothing fails.
        tried: how many subgraphs were looked at.
        compared_with: what was taken to be right.
    """

    fault: Fault | None
    tried: int
    compared_with: str


@dataclass
class _Good:
    """What is taken to be right, and the feeds that it gave.

    Attributes:
        folder: a bundle; None: each graph without optimizations.
        name: for the report.
        feeds: subgraph → feeds.
        failed: what the suspect bundle could not run.
        checks: comparisons of the whole bundle or of each subgraph with the reference.
    """

    folder: Path | None
    name: str
    feeds: Mapping[str, Sequence[Mapping[str, Array]]] = field(default_factory=dict)
    failed: tuple[str, dict[str, Array], str] | None = None
    checks: Sequence[Check] = ()


def find(
    bundle: Path,
    *,
    subgraph: str | None = None,
    against: Path | None = None,
    model: Path | None = None,
    recipe_folder: Path | None = None,
    rtol: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """Find the first subgraph that onnxruntime refuses or that computes something else than it should, and the node at fault.

    Args:
        bundle: the folder; its files may differ from what was built.
        subgraph: look at this file only.
        against: a bundle known to be good.
        model: the checkpoint; without `against`, a bundle is built from it anew to compare with.
        recipe_folder: as for `verify`.
        rtol: share of a tensor's largest magnitude that it may differ by; the tolerance table's subgraph row when None.
        progress: one line per step.

    Raises:
        RuntimeInputError: an unknown subgraph, no recorded conversations to play, or an `against` of another form.
        BundleError: files are missing.
        ParityError: the bundle's answers are wrong, and no part of a graph shows why by itself.
    """
    manifest = open_manifest(bundle)
    order = _order(bundle, manifest, subgraph)
    changed = tuple(name for name, entry in sorted(manifest.files.items()) if hash_file(path_in(bundle, name)) != entry.sha256)
    table = bound(precision_of_manifest(manifest), rtol)
    for file in order:
        progress(f"load {file}")
        if (why := refused(path_in(bundle, file))) is not None:
            return Verdict(replace(_refusal(bundle, file, "load", why, {}), changed=changed), len(order), "")
    with _good(bundle, manifest, against, model, recipe_folder, progress) as good:
        if good.failed is not None and good.failed[0] in order:
            file, feed, _ = good.failed
            return Verdict(replace(_run_refusal(bundle, file, feed), changed=changed), len(order), "")
        for file in order:
            progress(f"compare {file}")
            fault = _compare(bundle, file, good, table)
            if fault is not None:
                return Verdict(replace(fault, changed=changed), len(order), good.name)
        bad = next((c for c in good.checks if not c.passed and (c.subgraph in order or subgraph is None)), None)
        if bad is not None:
            raise ParityError(_unexplained(bad, good, changed, against, model))
    return Verdict(None, len(order), good.name)


def _unexplained(bad: Check, good: _Good, changed: Sequence[str], against: Path | None, model: Path | None) -> str:
    """Say that answers are wrong and that no subgraph shows why."""
    place = f" ({bad.subgraph})" if bad.subgraph else ""
    said = f"; not as built (sha256): {', '.join(changed)}" if changed else ""
    fix = "give --against a bundle that is known to be good, or --model"
    if against is not None:
        fix = "that bundle shares the fault: compare with another one"
    elif model is not None:
        fix = "the export or a pass is at fault, not this bundle's files: give --against a bundle of a good version, and report it"
    yet = f"and yet every subgraph computes what {good.name} does, so that no node can be named"
    return f"{bad.name}{place}: {bad.note}; {yet}{said}; {fix}"


def _order(bundle: Path, manifest: Manifest, subgraph: str | None) -> list[str]:
    """Return the files to look at; all of the bundle's files must be there."""
    order = list(running_order(manifest.program))
    missing = [name for name in manifest.files if not path_in(bundle, name).is_file()]
    if missing:
        raise BundleError(f"{bundle}: the file '{missing[0]}' is missing; copy the whole folder again")
    if subgraph is None:
        return order
    if subgraph not in order:
        raise RuntimeInputError(f"{bundle} runs no subgraph '{subgraph}'{nearest(subgraph, order)}; choose one of: {', '.join(order)}")
    return [subgraph]


# ----------------------------------------------------------------------------------------------------------- the good side
@contextmanager
def _good(
    bundle: Path, manifest: Manifest, against: Path | None, model: Path | None, folder: Path | None, progress: Callable[[str], None]
) -> Iterator[_Good]:
    if against is not None:
        _check_slots(bundle, manifest, against)
    if model is not None:
        yield from _from_checkpoint(bundle, manifest, against, model, folder, progress)
    elif against is not None:
        yield _from_bundle(bundle, against, progress)
    else:
        yield _from_itself(bundle, manifest, progress)


def _check_slots(bundle: Path, manifest: Manifest, against: Path) -> None:
    """Refuse a bundle whose graphs take keys and values of another type: neither can be fed with what the other one is."""
    mine, other = manifest.program.slot_kind, open_manifest(against).program.slot_kind
    if mine != other:
        raise RuntimeInputError(
            f"{bundle} keeps keys and values in {mine}, {against} in {other}; compare with a bundle of the same quantize.kv"
        )


def _from_itself(bundle: Path, manifest: Manifest, progress: Callable[[str], None]) -> _Good:
    cases = list(read_cases(bundle))
    if not cases:
        raise RuntimeInputError(f"{bundle} holds no recorded conversations to feed it with; give --against a bundle that does, or --model")
    progress("play the recorded conversations")
    capture = Capture(open_backend("onnxruntime", bundle, _options(manifest)))
    precision = precision_of_manifest(manifest)
    checks: list[Check] = []
    try:
        session = Session(bundle, manifest, capture, _options(manifest))
        for route in ("auto", "chunked"):
            checks += play(session, cases, tolerance("end_to_end", precision), precision, "chunked" if route == "chunked" else "auto")
    except RuntimeInputError as error:  # what a graph gave made the next step impossible
        checks.append(Check("the recorded conversations", None, False, f"cannot be played ({error})"))
    except BundleError:
        if capture.failed is None:
            raise
    return _Good(None, UNOPTIMISED, capture.feeds, capture.failed, checks)


def _from_bundle(bundle: Path, against: Path, progress: Callable[[str], None]) -> _Good:
    """Feeds come from the good bundle, so that each subgraph is judged on right inputs."""
    manifest = open_manifest(against)
    cases = list(read_cases(against)) or list(read_cases(bundle))
    if not cases:
        raise RuntimeInputError(f"neither {bundle} nor {against} holds recorded conversations to play; build one without --no-record")
    progress(f"play the recorded conversations through {against}")
    capture = Capture(open_backend("onnxruntime", against, _options(manifest)))
    session = Session(against, manifest, capture, _options(manifest))
    for case in cases:
        for route in ("auto", "chunked"):
            player = Player(session, "chunked" if route == "chunked" else "auto")
            for turn in case.turns:
                player.turn(turn)
    return _Good(against, f"{against}", capture.feeds)


def _from_checkpoint(
    bundle: Path, manifest: Manifest, against: Path | None, model: Path, folder: Path | None, progress: Callable[[str], None]
) -> Iterator[_Good]:
    """Feeds and verdicts come from PyTorch, values inside a graph from `against` or from a bundle built anew."""
    from tmc_export.verify.ladder import traced_cases
    from tmc_export.verify.subgraphs import check_subgraphs

    progress("ask the reference")
    _, cases = traced_cases(manifest, model, 4, folder)
    capture, precision = Capture(open_backend("onnxruntime", bundle, _options(manifest))), precision_of_manifest(manifest)
    checks: list[Check] = []
    try:
        checks += check_subgraphs(bundle, manifest.program, cases, tolerance("subgraph", precision), precision, capture)
    except BundleError:
        if capture.failed is None:
            raise
    if against is not None:
        yield _Good(against, f"{against}", capture.feeds, capture.failed, checks)
        return
    with tempfile.TemporaryDirectory(prefix="tmc-debug-") as place:
        progress("build the recipe anew from the checkpoint")
        twin = _twin(manifest, model, folder, Path(place) / "twin")
        yield _Good(twin, "a bundle built anew from the checkpoint", capture.feeds, capture.failed, checks)


def _twin(manifest: Manifest, model: Path, folder: Path | None, out: Path) -> Path:
    import json

    from tmc_export.api import build
    from tmc_export.recipe.recipe import Recipe

    recipe = Recipe.model_validate_json(json.dumps(manifest.recipe))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": str(model.resolve())})})
    return build(recipe.moved_to(folder or Path()), out, engines=False, record=False).folder


# --------------------------------------------------------------------------------------------------------------- verdicts
def _refusal(bundle: Path, file: str, kind: Any, why: str, feed: Mapping[str, Array]) -> Fault:
    path = path_in(bundle, file)
    with workspace_of(path) as space:
        return locate_refusal(file, kind, load_graph(path), space, why, refused, feed)


def _run_refusal(bundle: Path, file: str, feed: Mapping[str, Array]) -> Fault:
    try:
        execute(path_in(bundle, file), feed)
    except RuntimeError as error:
        return _refusal(bundle, file, "run", str(error), feed)
    raise BundleError(f"{file} failed while conversations were played, and runs now: memory or another process is at fault; try again")


def _compare(bundle: Path, file: str, good: _Good, table: Tolerance) -> Fault | None:
    """Run one subgraph on every feed and compare its outputs with the good ones."""
    suspect = path_in(bundle, file)
    right = suspect if good.folder is None else path_in(good.folder, file)
    if not right.is_file():
        raise RuntimeInputError(f"{good.folder} has no subgraph '{file}'; compare with a bundle of the same recipe")
    for feed in good.feeds.get(file, ()):
        try:
            got = execute(suspect, feed)
        except RuntimeError as error:
            if "has no value" in str(error):
                raise RuntimeInputError(
                    f"'{file}' of {good.folder} takes other inputs ({error}); compare with one of the same recipe"
                ) from error
            return _refusal(bundle, file, "run", str(error), feed)
        try:
            want = execute(right, feed, optimised=good.folder is not None)
        except RuntimeError as error:
            raise RuntimeInputError(
                f"'{file}' of {good.name} cannot be run on the same inputs ({error}); compare with another bundle"
            ) from error
        found = [compare(name, got.get(name), value, table) for name, value in want.items()]
        worst = max((d for d in found if d is not None), key=lambda d: d.error / (d.allowed or 1), default=None)
        if worst is None:
            continue
        why = f"{worst.tensor} {worst.note}"
        fault = locate_difference(file, suspect, right, feed, table, why, good.name)
        if fault is None:
            raise ParityError(f"{file}: {why}, compared with {good.name}; no smaller part of the graph shows it by itself")
        return fault
    return None
