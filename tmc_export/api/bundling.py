"""`build`: a recipe becomes a verified bundle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tmc_export.api.engines import prove
from tmc_export.bundle.manifest import MANIFEST, Manifest
from tmc_export.bundle.read import check_files, open_manifest
from tmc_export.bundle.write import atomic_folder, hash_file, seal
from tmc_export.core.errors import BundleError, ModelError
from tmc_export.core.lazy import require
from tmc_export.plan.describe import plan_json, report_json
from tmc_export.plan.make import report_plan
from tmc_export.plan.source import fetch, read_model_files
from tmc_export.plan.types import Plan
from tmc_export.recipe import load_device, load_recipe
from tmc_export.recipe.recipe import Recipe

__all__ = ["BuildResult", "build_bundle"]

SIDECARS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "generation_config.json", "config.json", "vocab.json", "merges.txt",
)  # fmt: skip
"""Hugging Face files that travel in the bundle unchanged, under `model/`."""

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
    """Build a recipe into a bundle folder.

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
    folder = fetch(loaded, weights=True)
    files = read_model_files(folder)
    device = load_device(loaded.target.device, loaded.folder)
    report = report_plan(loaded, files, device)
    plan = report.plan
    checkpoint = _fingerprint(folder)
    want_engines = loaded.target.runtime == "tensorrt-rtx" if engines is None else engines
    key = _key(loaded, plan, checkpoint, [record, want_engines])
    if not force and (found := _cached(target, key)) is not None:
        return BuildResult(target, found, cached=True)
    require("torch", extra="export", purpose="build a bundle")
    from tmc_export.api.subgraphs import export_subgraphs
    from tmc_export.export.task import check_task

    check_task(folder, plan.facts.architecture)
    config = _config(folder)
    with atomic_folder(target) as work:
        exported = export_subgraphs(plan, files, folder, config, work, loaded.inputs.fit, lambda name: progress(f"export {name}"))
        (work / "engines" / "profiles.json").write_text(json.dumps({"subgraphs": exported.profiles}, indent=1) + "\n", "utf-8")
        _copy_sidecars(folder, work / "model")
        (work / "report").mkdir()
        (work / "report" / "plan.json").write_text(json.dumps(report_json(report), indent=1) + "\n", "utf-8")
        manifest = Manifest(
            name=loaded.name,
            key=key,
            recipe=loaded.model_dump(mode="json"),
            plan=plan_json(plan),
            checkpoint={name: hash_file(folder / name) for name in sorted(checkpoint)},
            versions=_versions(),
            program=exported.program,
            proofs=prove(work, device, loaded, want_engines, progress),
        )
        progress("hash files")
        sealed = seal(work, manifest)
    return BuildResult(target, sealed, cached=False)


def _config(folder: Path) -> Any:
    transformers = require("transformers", extra="export", purpose="build a bundle")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder}: transformers cannot read config.json: {str(error).splitlines()[0]}") from error


def _fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """File → (size, mtime) of everything a build reads; cheap enough for every start."""
    names = [p for pattern in ("*.safetensors", "*.json", "*.jinja") for p in folder.glob(pattern)]
    return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(names)}


def _key(recipe: Recipe, plan: Plan, checkpoint: dict[str, tuple[int, int]], choices: list[bool]) -> str:
    text = json.dumps([recipe.canonical_json(), plan_json(plan), checkpoint, _versions(), _source_digest(), choices], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _source_digest() -> str:
    """Hash of tmc-export's own build-side code: a bundle of other code is not the same bundle."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
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


def _copy_sidecars(folder: Path, out: Path) -> None:
    out.mkdir(parents=True)
    for name in SIDECARS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
