"""Climbing the parity ladder: from Hugging Face, over the reference with the plan, to every subgraph and the whole bundle.

Rungs: Hugging Face eager → eager with the plan → onnxruntime per subgraph → onnxruntime end to end → float16 range → quantized → TensorRT.
A rung that did not run says so; a missing output fails; the first bad subgraph is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tmc_export.bundle.manifest import Manifest
from tmc_export.bundle.read import check_files, open_manifest
from tmc_export.bundle.write import hash_file
from tmc_export.core.errors import ModelError, ParityError, RuntimeInputError
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.describe import plan_json
from tmc_export.plan.make import make_plan
from tmc_export.plan.quantization import ON_ONNXRUNTIME
from tmc_export.plan.source import fetch_source, read_model_files
from tmc_export.plan.types import Plan
from tmc_export.recipe.recipe import Recipe
from tmc_export.runtime.session import load
from tmc_export.verify.on_device import NO_GPU, RUNG, device_precision, device_rung
from tmc_export.verify.play import play
from tmc_export.verify.recorded import Case, read_cases
from tmc_export.verify.rungs import Ladder, Rung, not_run, rung_of
from tmc_export.verify.saved import check_identity, judge_saved, read_outputs
from tmc_export.verify.tolerances import Precision, coarsest, grade, tolerance

__all__ = ["RUNGS", "climb", "device_ladder", "precision_of_manifest", "recorded_ladder", "saved_ladder", "traced_cases"]

Progress = Callable[[str], None]

RUNGS = (
    "files",
    "Hugging Face eager",
    "eager with the plan",
    "onnxruntime per subgraph",
    "onnxruntime end to end",
    "float16 range",
    "quantized",
    RUNG,
)
SAVED = "saved outputs"
"""The rung of `saved_ladder`."""
_NO_CHECKPOINT = "needs the checkpoint; give --model"


def recorded_ladder(bundle: Path, progress: Progress = lambda _: None) -> Ladder:
    """Verify a bundle by itself: every hash, and the recorded conversations through the runtime. No torch, no checkpoint.

    Raises:
        BundleError: files are missing, changed or damaged.
    """
    manifest, files = _files(bundle, progress)
    cases = list(read_cases(bundle))
    progress(RUNGS[4])
    end, quantized = _end_to_end(bundle, manifest, cases)
    middle = [not_run(name, _NO_CHECKPOINT) for name in (RUNGS[1], RUNGS[2], RUNGS[3])]
    return Ladder((files, *middle, end, not_run(RUNGS[5], _NO_CHECKPOINT), quantized, not_run(RUNG, NO_GPU)))


def _end_to_end(bundle: Path, manifest: Manifest, cases: Sequence[Case]) -> tuple[Rung, Rung]:
    """Play conversations whole and chunked; a quantized bundle answers on its own rung."""
    end, quantized, precision = RUNGS[4], RUNGS[6], precision_of_manifest(manifest)
    if (foreign := _foreign(manifest)) is not None:
        return not_run(end, foreign), not_run(quantized, foreign)
    if not cases:
        why = "the bundle holds no recorded conversations; build it without --no-record, or give --model"
        return not_run(end, why), not_run(quantized, why)
    session, table = load(bundle, int4_accuracy=1), tolerance("end_to_end", precision)  # 1: what W4A16 on a device computes
    checks = [*play(session, cases, table, precision)]
    checks += [replace(c, name=f"chunked {c.name}") for c in play(session, cases, table, precision, "chunked")]
    note = f"{len(cases)} conversations, {sum(len(t.expected.tokens) for c in cases for t in c.turns)} steps, prefilled whole and in chunks"
    if precision == "float32":
        brought = manifest.schemes - manifest.rounding
        own = f"the checkpoint's own {', '.join(sorted(brought))} codes round nothing: the end-to-end rung plays them"
        why = own if brought else "nothing is quantized"
        return rung_of(end, checks, note), not_run(quantized, why)
    how = f"{precision} at onnxruntime accuracy level 1" if precision in ("int4", "int8") else precision
    why = "the graphs hold reduced precision; the next rung but one plays them"
    return not_run(end, why), rung_of(quantized, checks, f"{how}; {note}")


def _files(bundle: Path, progress: Progress) -> tuple[Manifest, Rung]:
    progress(RUNGS[0])
    manifest = open_manifest(bundle)
    check_files(bundle, manifest)
    return manifest, Rung(RUNGS[0], "passed", f"{len(manifest.files)} files have their sha256")


def device_ladder(bundle: Path, backend: str, provider: str = "cpu", progress: Progress = lambda _: None) -> Ladder:
    """Verify a bundle on its device: every hash, and the recorded conversations by another backend than onnxruntime's CPU path.

    Args:
        bundle: the folder.
        backend: see `runtime.load`.
        provider: likewise.
        progress: called with the name of each rung before it runs.

    Raises:
        BundleError: files are missing, changed or damaged.
        TmcError: as `device_rung`.
    """
    manifest, files = _files(bundle, progress)
    progress(f"{backend}, provider {provider}" if backend == "onnxruntime" else backend)
    return Ladder((files, device_rung(bundle, list(read_cases(bundle)), precision_of_manifest(manifest), backend, provider)))


def saved_ladder(bundle: Path, outputs: Path, progress: Progress = lambda _: None) -> Ladder:
    """Verify what a device saved: every hash of the bundle, and the outputs against the recorded reference, as the end-to-end rung judges.

    Args:
        bundle: the folder that was played on the device.
        outputs: what `tmc-export replay` wrote there.
        progress: called with the name of each rung before it runs.

    Raises:
        BundleError: files are missing, changed or damaged.
        RuntimeInputError: `outputs` cannot be read, or the bundle holds no recorded conversations.
        ParityError: `outputs` belongs to another bundle.
    """
    manifest, files = _files(bundle, progress)
    progress(SAVED)
    cases, saved = list(read_cases(bundle)), read_outputs(outputs)
    if not cases:
        raise RuntimeInputError(f"{bundle} holds no recorded conversations to compare with; build it without --no-record")
    check_identity(outputs, saved, manifest)
    precision = precision_of_manifest(manifest)
    judged = device_precision(precision) if saved.products == "tf32" else precision
    checks = list(judge_saved(saved, manifest.program, cases, tolerance("end_to_end", judged), judged))
    steps = sum(len(t.expected.tokens) for c in cases for t in c.turns)
    how = "prefilled whole and in chunks" if "chunked" in saved.routes else "in chunks: not run"
    row = f", judged as {judged}, because its float32 is TF32" if judged != precision else ""
    return Ladder((files, rung_of(SAVED, checks, f"made by {saved.made_by}{row}; {len(cases)} conversations, {steps} steps, {how}")))


def precision_of_manifest(manifest: Manifest) -> Precision:
    """Return the row of the tolerance tables; as `precision_of`, from the recorded plan."""
    grades = {grade(weights, activations) for weights, activations in manifest.rounding}
    kv = manifest.program.kv
    return coarsest(grades, str(manifest.plan.get("dtype")), None if kv is None else kv.dtype)


def _foreign(manifest: Manifest) -> str | None:
    """Why onnxruntime cannot play a bundle; None when it can."""
    names = sorted(manifest.schemes - set(ON_ONNXRUNTIME))
    return f"onnxruntime's CPU path does not execute {', '.join(names)}; only the device does" if names else None


# ------------------------------------------------------------------------------------------------------ with the checkpoint
@dataclass(frozen=True)
class _Climb:
    """What the rungs share."""

    bundle: Path
    model: Path
    manifest: Manifest
    plan: Plan
    cases: tuple[Case, ...]
    precision: Precision


def climb(
    bundle: Path,
    model: Path,
    progress: Progress = lambda _: None,
    steps: int = 8,
    recipe_folder: Path | None = None,
    backend: str = "onnxruntime",
    provider: str = "cpu",
) -> Ladder:
    """Verify a bundle against the checkpoint it was made from, rung by rung.

    Args:
        bundle: the folder.
        model: the checkpoint's folder.
        progress: called with the name of each rung before it runs.
        steps: tokens answered per turn.
        recipe_folder: what relative paths of the recipe start from (learned weights, text towers, a device file); the working directory
            when None.
        backend: see `runtime.load`; another one than onnxruntime's CPU path plays a rung of its own, too, at the end.
        provider: likewise.

    Raises:
        BundleError: files are missing, changed or damaged.
        ModelError: the checkpoint is another one, or cannot be loaded.
        ParityError: the bundle's plan is not what its recipe gives now.
    """
    progress(RUNGS[0])
    manifest = open_manifest(bundle)
    check_files(bundle, manifest)
    plan, cases = traced_cases(manifest, model, steps, recipe_folder)
    inputs = len(manifest.checkpoint) + len(manifest.weights)
    files_rung = Rung(RUNGS[0], "passed", f"{len(manifest.files)} files and {inputs} of the checkpoint have their sha256")
    shared = _Climb(bundle, model, manifest, plan, cases, precision_of_manifest(manifest))
    rungs = [files_rung]
    steps_of: list[Callable[[_Climb], Sequence[Rung]]] = [_hugging_face, _with_plan, _per_subgraph, _whole]
    for name, run in zip(RUNGS[1:5], steps_of, strict=True):
        progress(name)
        rungs += run(shared)
    progress(RUNGS[5])
    rungs.insert(-1, _half_range(shared))
    if backend == "onnxruntime":
        rungs.append(not_run(RUNG, NO_GPU))
    if (backend, provider) != ("onnxruntime", "cpu"):
        progress(RUNG if backend != "onnxruntime" else f"onnxruntime, provider {provider}")
        rungs.append(device_rung(bundle, cases, shared.precision, backend, provider))
    return Ladder(tuple(rungs))


def traced_cases(manifest: Manifest, model: Path, steps: int = 8, recipe_folder: Path | None = None) -> tuple[Plan, tuple[Case, ...]]:
    """Plan a bundle's recipe again and let the reference answer made-up conversations, tracing what every subgraph takes and gives.

    Args:
        manifest: the bundle's.
        model: the checkpoint's folder.
        steps: tokens answered per turn.
        recipe_folder: as for `climb`.

    Raises:
        ModelError: the checkpoint is another one, or cannot be loaded.
        ParityError: the bundle's plan is not what its recipe gives now.
    """
    from tmc_export.verify.record import answer, made_up_scripts
    from tmc_export.verify.reference import Reference

    _check_checkpoint(manifest, model)
    plan, files, fit = _plan(manifest, model, recipe_folder)
    reference = Reference(model, plan, trace=True, codes=manifest.program.kv)
    return plan, tuple(answer(reference, script, plan, steps) for script in made_up_scripts(model, plan, files, fit))


def _check_checkpoint(manifest: Manifest, model: Path) -> None:
    for name, digest in manifest.checkpoint.items():
        path = model / name
        if not path.is_file():
            raise ModelError(f"{model} lacks '{name}', which the bundle was made from; give the folder of that checkpoint")
        if hash_file(path) != digest:
            raise ModelError(f"{path} is not the file that the bundle was made from (sha256); give the folder of that checkpoint")


def _check_learned(manifest: Manifest, recipe: Recipe) -> None:
    """Find the files of learned method weights again, and make sure that they are the ones that were built in."""
    for index, entry in enumerate(recipe.compress):
        path, name = recipe.weights_file(index), None if entry.weights is None else entry.weights.file
        if path is None or name is None:
            continue
        if not path.is_file():
            raise ModelError(
                f"there is no {path}, whose weights the bundle's '{entry.method}' has; give the recipe's folder: --recipe-folder"
            )
        if hash_file(path) != manifest.weights.get(name):
            raise ModelError(f"{path} is not the file of learned weights that the bundle was made from (sha256); give that file's folder")


def _check_towers(manifest: Manifest, recipe: Recipe) -> None:
    """Find the text towers again, and make sure that they are the ones that were built in."""
    for source, files in manifest.towers.items():
        folder = fetch_source(recipe, source, "text tower", None, weights=True)
        for name, digest in files.items():
            if not (folder / name).is_file():
                raise ModelError(f"{folder} lacks '{name}' of the text tower '{source}'; give the recipe's folder: --recipe-folder")
            if hash_file(folder / name) != digest:
                raise ModelError(f"{folder / name} is not the file of the text tower that the bundle was made from (sha256); give that one")


def _plan(manifest: Manifest, model: Path, folder: Path | None) -> tuple[Plan, ModelFiles, str | None]:
    """Plan the bundle's recipe against the checkpoint again; the plan must be the one that was built."""
    recipe = Recipe.model_validate_json(json.dumps(manifest.recipe))
    if folder is not None:
        recipe = recipe.moved_to(folder)
    _check_learned(manifest, recipe)
    _check_towers(manifest, recipe)
    files = read_model_files(model)
    plan, _ = make_plan(recipe, files)
    now, built = plan_json(plan), manifest.plan
    differing = sorted(k for k in {*now, *built} if now.get(k) != built.get(k))
    if differing:
        raise ParityError(
            f"the recipe gives another plan now than when the bundle was built ({', '.join(differing)} differ); build it again"
        )
    return plan, files, recipe.inputs.fit


def _hugging_face(shared: _Climb) -> list[Rung]:
    """The reference without any stage against Hugging Face's own `generate`, on first turns."""
    from tmc_export.verify.against import compare_with_generate

    checks = list(compare_with_generate(shared.model, shared.plan, shared.cases, tolerance("eager", "float32")))
    return [rung_of(RUNGS[1], checks, "the reference without the plan's stages, against generate()")]


def _with_plan(shared: _Climb) -> list[Rung]:
    """The reference with the plan against what was recorded when the bundle was built."""
    from tmc_export.verify.against import compare_with_plain_slots, compare_with_recorded

    recorded = list(read_cases(shared.bundle))
    if not recorded:
        return [
            not_run(RUNGS[2], "the bundle holds no recorded conversations to compare with; later rungs compare with the reference itself")
        ]
    codes = shared.manifest.program.kv
    table = tolerance("eager", "float32") if codes is None else tolerance("end_to_end", f"{codes.dtype} slots")  # machines turn other codes
    checks, note = list(compare_with_recorded(shared.model, shared.plan, recorded, table, codes)), ""
    if codes is not None:
        checks += compare_with_plain_slots(shared.model, shared.plan, shared.cases, tolerance("end_to_end", codes.dtype))
        note = f", and what {codes.dtype} slots cost"
    return [rung_of(RUNGS[2], checks, f"the reference with the plan, against the bundle's recorded outputs{note}")]


def _per_subgraph(shared: _Climb) -> list[Rung]:
    if (foreign := _foreign(shared.manifest)) is not None:
        return [not_run(RUNGS[3], foreign)]
    from tmc_export.verify.subgraphs import check_subgraphs

    table = tolerance("subgraph", shared.precision)
    checks = list(check_subgraphs(shared.bundle, shared.manifest.program, shared.cases, table, shared.precision))
    seen = {c.subgraph for c in checks if c.subgraph}
    return [rung_of(RUNGS[3], checks, f"{len(seen)} subgraphs, each fed with the reference's inputs")]


def _whole(shared: _Climb) -> list[Rung]:
    return list(_end_to_end(shared.bundle, shared.manifest, shared.cases))


def _half_range(shared: _Climb) -> Rung:
    """Largest magnitudes in float32, and the same conversation in torch's half precision."""
    from tmc_export.verify.against import compare_half

    judged, codes = shared.plan.dtype == "float16", shared.manifest.program.kv
    checks, note = compare_half(shared.model, shared.plan, shared.cases[-1], judged=judged, codes=codes)
    return rung_of(RUNGS[5], checks, note)
