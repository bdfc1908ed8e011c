"""Engines of a bundle that is being built: made here for RTX, prepared for the board for Jetson. A missing package never fails a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tmc_export.core.errors import MissingExtraError
from tmc_export.recipe import Device, Recipe

__all__ = ["prove"]


def prove(bundle: Path, device: Device, recipe: Recipe, wanted: bool, progress: Callable[[str], None]) -> dict[str, str]:
    """Build or prepare the engines and say what was done.

    Args:
        bundle: the bundle's temporary folder, with `onnx/` and `engines/profiles.json`.
        device: the target.
        recipe: its `target` names the runtime and, optionally, the compute capabilities.
        wanted: build TensorRT-RTX engines.
        progress: one line per step.

    Returns:
        Rung → outcome, for the manifest.

    Raises:
        TmcError: a graph that the builder refuses, or too little memory.
    """
    from tmc_export.engine import DeviceTarget, EngineOptions, build_engines, write_on_device_script

    proofs: dict[str, str] = {}
    if device.tensorrt.flavour == "tensorrt" and device.tensorrt.version is not None:
        progress(f"write build_on_device.sh for {device.name}")
        _, warnings = write_on_device_script(bundle, DeviceTarget(device.name, device.tensorrt.version))
        for warning in warnings:
            progress(f"warning: {warning}")
        proofs["engines"] = f"not run: built on the device by build_on_device.sh (TensorRT {device.tensorrt.version})"
    if wanted:
        names = recipe.target.compute_capabilities
        capabilities = tuple("SM" + n.replace(".", "") for n in names) if names else ((device.sm,) if device.sm else ("SM89",))
        shown: set[str] = set()

        def report(name: str, phase: str, done: int, total: int) -> None:
            if name not in shown:
                shown.add(name)
                progress(f"engine {name} for {', '.join(capabilities)}")

        try:
            reports = build_engines(bundle, EngineOptions(capabilities=capabilities), report)
        except MissingExtraError as error:
            progress(f"engines were not built: {error}")
            proofs["engines"] = f"not run: {error}"
        else:
            size = sum(r.size for r in reports)
            proofs["engines"] = f"passed: {len(reports)} TensorRT-RTX engines built for {', '.join(capabilities)}, {size / 1e6:.1f} MB"
    proofs["execution on a GPU"] = "not run"
    return proofs
