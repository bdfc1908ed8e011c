"""What the command line and users call: `build` and `load`. Heavy rooms are imported inside the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmc_export.api.bundling import BuildResult
    from tmc_export.recipe import Recipe
    from tmc_export.runtime.session import Session

__all__ = ["build", "load"]


def build(
    recipe: str | Path | Recipe,
    output: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    engines: bool | None = None,
    record: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> BuildResult:
    """Compile a recipe into a bundle.

    Args:
        recipe: a recipe file, the name of a shipped recipe, or a loaded `Recipe`.
        output: the bundle's folder; `out/<recipe name>` when None.
        overrides: settings such as `"compress.0.keep=25%"`, applied to a recipe file.
        force: build even when the folder holds this very bundle.
        engines: build TensorRT-RTX engines; None: when the recipe's runtime is `tensorrt-rtx`.
        record: run the PyTorch reference and keep its outputs, so that the bundle can be verified without the checkpoint.
        progress: called with one line per step.

    Returns:
        `folder`, `manifest` and `cached`.

    Raises:
        TmcError: a recipe, model, plan or resource at fault; nothing half-written is left.
    """
    from tmc_export.api.bundling import build_bundle
    from tmc_export.recipe import Recipe, load_recipe

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    target = Path("out") / loaded.name if output is None else Path(output)
    return build_bundle(loaded, target, force=force, engines=engines, record=record, progress=progress)


def load(folder: str | Path, *, backend: str = "onnxruntime", threads: int | None = None, provider: str = "cpu") -> Session:
    """Open a bundle; see `Session.generate` and `Session.turn`. Needs no torch.

    Args:
        folder: the bundle.
        backend: `onnxruntime`, or `tensorrt` or `tensorrt-rtx` for the bundle's engines (*not run on a GPU*).
        threads: threads of the CPU path; None: its own choice.
        provider: what onnxruntime uses: `cpu`, `cuda` or `tensorrt` (the last two *not run*).

    Raises:
        TmcError: files are missing or damaged, or this machine lacks what the backend needs.
    """
    from tmc_export.runtime.session import load as open_session

    return open_session(folder, backend=backend, threads=threads, provider=provider)
