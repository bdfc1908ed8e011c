"""`tmc-export devices`: the devices a recipe may target, and what is known of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tmc_export.recipe import Device, Figure

__all__ = ["command"]


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(name: str | None, as_json: bool) -> None:
    """List the devices, or show one: its figures with their sources. NAME is a shipped device or a device file.

    A figure marked with ~ is unverified: it was not read in a document of the maker.
    """
    import json

    from tmc_export.recipe import devices, load_device

    if name is not None:
        device = load_device(name)
        click.echo(json.dumps(device.model_dump(mode="json"), indent=2, ensure_ascii=False) if as_json else _page(device))
        return
    known = devices()
    if as_json:
        click.echo(json.dumps([device.model_dump(mode="json") for device in known], indent=2, ensure_ascii=False))
        return
    width = max(len(device.name) for device in known)
    click.echo(f"{'device':<{width}}  {'arch':<5}  {'GiB':>5}  {'GB/s':>7}  {'fp16':>7}  {'int8':>7}  engines")
    for device in known:
        figures = [device.memory_gib, device.memory_bandwidth_gb_s, device.rate("fp16"), device.rate("int8")]
        cells = "  ".join(f"{_short(figure):>{size}}" for figure, size in zip(figures, (5, 7, 7, 7), strict=True))
        click.echo(f"{device.name:<{width}}  {device.sm or '-':<5}  {cells}  {_engines(device)}")
    click.echo("fp16, int8: peak dense tera-operations a second; ~ is unverified, ? is unknown, - is not there")


def _short(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if figure.value is None:
        return "?"
    return f"{'~' if figure.unverified else ''}{figure.value:g}"


def _engines(device: Device) -> str:
    if device.tensorrt.flavour == "none":
        return "none (onnxruntime only)"
    return f"{device.tensorrt.flavour} {device.tensorrt.version}" + (
        f" (JetPack {device.tensorrt.jetpack})" if device.tensorrt.jetpack else ""
    )


def _page(device: Device) -> str:
    """Return everything the file says, sources included, as text."""
    lines = [
        f"{device.name}: {device.product}",
        f"kind: {device.kind}",
        f"compute capability: {device.compute_capability or 'none'}  [{device.sources.compute_capability}]",
        f"engines: {_engines(device)}, opset up to {device.tensorrt.opset}  [{device.sources.tensorrt}]",
        f"precisions: {', '.join(device.precisions)}  [{device.sources.precisions}]",
        f"memory: {'shared by CPU and GPU' if device.memory_shared else 'its own'}",
    ]
    for key, figure in device.figures().items():
        lines.append(f"{key}: {_short(figure)}" + (f"  [{figure.source}]" if figure.source else ""))
    lines += [f"note: {note}" for note in device.notes]
    if any(figure.unverified for figure in device.figures().values()):
        lines.append("~ and ?: unverified, not read in a document of the maker")
    return "\n".join(lines)
