"""`build`: a recipe becomes a verified bundle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tmc_export.api.calibration_data import digest_of, samples_of
from tmc_export.api.engines import prove
from tmc_export.api.parity import check_recorded, record_reference
from tmc_export.api.sidecars import copy_sidecars
from tmc_export.bundle.journal import Journal
from tmc_export.bundle.manifest import MANIFEST, Manifest
from tmc_export.bundle.read import check_files, open_manifest
from tmc_export.bundle.work import WorkFolder, check_replaceable, remove_remains
from tmc_export.bundle.write import hash_file, rebuilt, seal, write_manifest
from tmc_export.core.errors import BundleError, ModelError
from tmc_export.core.lazy import require
from tmc_export.plan.describe import plan_json, report_json
from tmc_export.plan.make import for_this_builder, make_plan, report_plan
from tmc_export.plan.notes import emitted_opset
from tmc_export.plan.source import fetch, read_model_files
from tmc_export.plan.towers import fetch_towers
from tmc_export.plan.types import TowerPlan
from tmc_export.quantize.calibrated import Calibrated
from tmc_export.recipe import load_device, load_recipe
from tmc_export.recipe.recipe import Recipe

__all__ = ["BuildResult", "build_bundle", "open_config"]

_TOOLS = ("tmc-export", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


class BuildResult:
    """What `build_bundle` did.

    Attributes:
        folder: the bundle.
        manifest: its manifest.
        cached: nothing had to be built.
    """

    def __init__(self, folder: Path, manifest: Manifest, cached: bool) -> None:
        self.folder, self.manifest, self.cached = folder, manifest, cached


def build_bundle(
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    record: bool = True,
    engines: bool | None = None,
) -> BuildResult:
    """Build a recipe into a bundle folder; one that was killed or interrupted goes on where it stopped.

    Of two builds of one bundle at once, the second waits and takes what the first has built.

    Args:
        recipe: a recipe file, the name of a shipped recipe, or a loaded recipe.
        out: the folder; an existing bundle there is replaced at the end, anything else is refused.
        overrides: `key=value` settings applied to a recipe file.
        force: build even when `out` holds this very bundle.
        progress: called with one line per step.
        record: run the reference and store its outputs in `parity/`, so that the bundle can be verified without the checkpoint.
        engines: build TensorRT-RTX engines; None: when the recipe's runtime is `tensorrt-rtx`.

    Raises:
        TmcError: any of its subclasses; nothing half-written is left.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    target = Path(out)
    check_replaceable(target)
    folder = fetch(loaded, weights=True)
    files = read_model_files(folder)
    device = load_device(loaded.target.device, loaded.folder)
    want_engines = loaded.target.runtime == "tensorrt-rtx" if engines is None else engines
    if want_engines and make_plan(named := for_this_builder(loaded), files, device)[1]:
        loaded = named  # blocks are cut for this machine: the manifest says for which memory
    report = report_plan(loaded, files, device)
    plan = report.plan
    checkpoint = _fingerprint(folder)
    learned = _learned_files(loaded)
    towers = fetch_towers(loaded, plan)
    stamps = {source: _fingerprint(place) for source, place in towers.items()}
    samples = samples_of(loaded)
    key = _key(
        [
            loaded.canonical_json(),
            plan_json(plan),
            device.model_dump(mode="json"),
            checkpoint,
            _stamps(learned),
            stamps,
            digest_of(samples),
            record,
            want_engines,
        ]
    )
    if not force and (there := _cached(target, key)) is not None:
        remove_remains(target)
        return BuildResult(target, there, cached=True)
    _check_text_files(folder)
    for tower in plan.towers:
        _check_tower_files(towers[tower.source], tower)
    require("torch", extra="export", purpose="build a bundle")
    from tmc_export.api.calibrate import calibrate
    from tmc_export.api.calibration_stored import calibrated_once
    from tmc_export.api.subgraphs import export_subgraphs
    from tmc_export.export.task import check_task

    check_task(folder, plan.facts.architecture)
    config = open_config(folder)
    with WorkFolder(target, key=key, waiting=lambda: progress("another build of this bundle is at work: waiting for its end")) as building:
        if building.waited and not force and (there := _cached(target, key)) is not None:
            return BuildResult(target, there, cached=True)
        work, journal = building.path, _journal(building.path, key, progress)
        found = Calibrated()
        if loaded.quantize.calibration is not None:
            found = calibrated_once(journal, lambda place: calibrate(plan, loaded, samples, files, folder, config, towers, progress, place))
        exported = export_subgraphs(
            plan,
            files,
            folder,
            config,
            work,
            loaded.inputs.fit,
            emitted_opset(plan, device),
            lambda name: progress(f"export {name}"),
            towers,
            found,
            journal,
        )
        (work / "engines" / "profiles.json").write_text(json.dumps({"subgraphs": exported.profiles}, indent=1) + "\n", "utf-8")
        copy_sidecars(folder, work / "model")
        for place, program in zip(towers.values(), exported.program.towers, strict=True):
            copy_sidecars(place, work / program.folder)
        (work / "report").mkdir()
        (work / "report" / "plan.json").write_text(json.dumps(report_json(report), indent=1) + "\n", "utf-8")
        manifest = Manifest(
            name=loaded.name,
            key=key,
            recipe=loaded.model_dump(mode="json"),
            plan=plan_json(plan),
            checkpoint={name: hash_file(folder / name) for name in sorted(checkpoint)},
            weights={name: hash_file(path) for name, path in learned.items()},
            towers={source: {name: hash_file(towers[source] / name) for name in sorted(names)} for source, names in stamps.items()},
            calibration={"samples": found.samples, "sha256": found.digest} if samples else None,
            versions=_versions(),
            program=exported.program,
            proofs=prove(work, device, loaded, want_engines, progress, journal),
        )
        reason: str | None = "--no-record"
        if record:
            reason = record_reference(folder, plan, files, work, loaded.inputs.fit, progress, journal, exported.program.kv)
        progress("hash files")
        sealed = seal(work, manifest)
        parity = check_recorded(work, progress) if reason is None else {"onnxruntime end to end": f"not run: {reason}"}
        sealed = write_manifest(work, sealed.model_copy(update={"proofs": {**parity, **sealed.proofs}}))
        building.publish()
    return BuildResult(target, sealed, cached=False)


def _journal(work: Path, key: str, progress: Callable[[str], None]) -> Journal:
    """Open the journal of a folder, and say what an earlier build left there."""
    journal = Journal(work, key, rebuilt)
    if journal.problem is not None:
        progress(f"an earlier build left work that is not whole, what follows is done again: {journal.problem}")
    if journal.resumed is not None:
        progress(f"going on where an earlier build stopped: {journal.resumed}")
    return journal


def _check_text_files(folder: Path) -> None:
    """Make sure that the runtime will be able to read the model's tokenizer and chat template.

    Raises:
        ModelError: a file is missing or damaged.
    """
    from tmc_export.runtime._chat import ChatTemplate
    from tmc_export.runtime._tokenizer import Tokenizer

    try:
        ChatTemplate.from_folder(folder, Tokenizer(folder).special_tokens)
    except BundleError as error:
        raise ModelError(str(error).replace("build the bundle again", "fetch the model again")) from error


def _check_tower_files(folder: Path, tower: TowerPlan) -> None:
    """Make sure that the runtime can read a text tower's tokenizer, and that it ends a text with the token that the tower is read at.

    Raises:
        ModelError: a file is missing or damaged, or the tokenizer is another model's.
    """
    from tmc_export.runtime._text_tower import tower_ids
    from tmc_export.runtime._tokenizer import Tokenizer

    try:
        ids = tower_ids(Tokenizer(folder), "a", tower.tokens)
    except BundleError as error:
        raise ModelError(str(error).replace("build the bundle again", "fetch the text tower again")) from error
    if tower.end not in ids or max(ids) >= tower.vocabulary:
        raise ModelError(
            f"{folder}: the text tower is read at token {tower.end} of {tower.vocabulary}, and its tokenizer writes {ids[:4]}…; "
            "tokenizer.json and config.json do not belong together: give the files of one checkpoint"
        )


def open_config(folder: Path) -> Any:
    """Return transformers' configuration of a model folder.

    Raises:
        ModelError: it cannot be read.
    """
    transformers = require("transformers", extra="export", purpose="build a bundle")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: transformers cannot read config.json: {' '.join(str(error).split())}") from error


def _fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """File → (size, mtime) of everything a build reads; cheap enough for every start."""
    names = [p for pattern in ("*.safetensors", "*.json", "*.jinja") for p in folder.glob(pattern)]
    return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(names)}


def _learned_files(recipe: Recipe) -> dict[str, Path]:
    """Files of learned method weights: as the recipe writes them → on this machine."""
    found: dict[str, Path] = {}
    for index, entry in enumerate(recipe.compress):
        path = recipe.weights_file(index)
        if path is not None and entry.weights is not None and entry.weights.file is not None:
            found[entry.weights.file] = path
    return found


def _stamps(files: dict[str, Path]) -> dict[str, tuple[int, int]]:
    return {name: (path.stat().st_size, path.stat().st_mtime_ns) for name, path in sorted(files.items())}


def _key(inputs: list[Any]) -> str:
    """Hash what a bundle is made from and with."""
    return hashlib.sha256(json.dumps([*inputs, _versions(), _source_digest()], sort_keys=True).encode()).hexdigest()


def _source_digest() -> str:
    """Hash of tmc-export's own code: a bundle of other code is not the same bundle. In a checkout the methods lie behind a link."""
    root = Path(__file__).resolve().parent.parent
    files = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names if name.endswith(".py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for tool in _TOOLS:
        try:
            found[tool] = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            found[tool] = "not installed"
    return found


def _cached(target: Path, key: str) -> Manifest | None:
    if not (target / MANIFEST).is_file():
        return None
    try:
        manifest = open_manifest(target)
        if manifest.key != key:
            return None
        check_files(target, manifest, sizes_only=True)
    except BundleError:
        return None
    return manifest
