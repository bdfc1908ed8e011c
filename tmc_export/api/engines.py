"""Engines of a bundle that is being built: made here for RTX, prepared for the board for Jetson. A missing package never fails a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tmc_export.bundle.journal import Journal
from tmc_export.core.errors import MissingExtraError
from tmc_export.recipe import Device, Recipe

__all__ = ["prove"]


def prove(bundle: Path, device: Device, recipe: Recipe, wanted: bool, progress: Callable[[str], None], journal: Journal) -> dict[str, str]:
    """Build or prepare the engines and say what was done.

    Args:
        bundle: the bundle's temporary folder, with `onnx/` and `engines/profiles.json`.
        device: the target.
        recipe: its `target` names the runtime and, optionally, the compute capabilities.
        wanted: build TensorRT-RTX engines.
        progress: one line per step.
        journal: of `bundle`: told of the graphs that are written anew. Engines have a record of their own.

    Returns:
        Rung → outcome, for the manifest.

    Raises:
        TmcError: a graph that the builder refuses, or too little memory.
    """
    from tmc_export.engine import WAITING, DeviceTarget, EngineOptions, build_engines, engine_cache, write_on_device_script

    proofs: dict[str, str] = {}
    if device.tensorrt.flavour == "tensorrt" and device.tensorrt.version is not None:
        progress(f"write build_on_device.sh for {device.name}")
        _, warnings = write_on_device_script(bundle, DeviceTarget(device.name, device.tensorrt.version))
        journal.finish("on device", [f"engines/{path.name}" for path in sorted((bundle / "engines").glob("*.onnx"))], None)
        for warning in warnings:
            progress(f"warning: {warning}")
        proofs["engines"] = f"not run: built on the device by build_on_device.sh (TensorRT {device.tensorrt.version})"
    if wanted:
        names = recipe.target.compute_capabilities
        capabilities = tuple("SM" + n.replace(".", "") for n in names) if names else ((device.sm,) if device.sm else ("SM89",))
        shown: set[str] = set()

        def report(name: str, phase: str, done: int, total: int) -> None:
            if phase == WAITING:
                progress(f"engine {name}: {phase}")
            elif name not in shown:
                shown.add(name)
                progress(f"engine {name} for {', '.join(capabilities)}")

        cache = engine_cache()
        try:
            reports = build_engines(bundle, EngineOptions(capabilities=capabilities), report, cache=cache)
        except MissingExtraError as error:
            progress(f"engines were not built: {error}")
            proofs["engines"] = f"not run: {error}"
        else:
            for problem in cache.problems if cache else ():
                progress(f"warning: {problem}")
            size = sum(r.size for r in reports)
            proofs["engines"] = f"passed: {len(reports)} TensorRT-RTX engines built for {', '.join(capabilities)}, {size / 1e6:.1f} MB"
    proofs["execution on a GPU"] = "not run"
    return proofs
