"""`tmc-export engine BUNDLE`: builds the bundle's TensorRT engines."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["command"]


@click.command(name="engine")
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--runtime",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    default="tensorrt-rtx",
    show_default=True,
    help="tensorrt-rtx builds anywhere for the named GPUs; tensorrt builds on the device, for the device.",
)
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    metavar="SM",
    help="GPU to build for (tensorrt-rtx), such as SM89; repeatable. By default as before, else this machine's.",
)
@click.option("--workspace-mib", type=click.IntRange(min=1), help="Scratch memory limit of the builder, MiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), default=3, show_default=True, help="0 builds fast, 5 searches longest.")
@click.option("--ignore-memory", is_flag=True, help="Build even when memory looks too small.")
@click.option("--force", is_flag=True, help="Build again what is still valid.")
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON.")
def command(
    bundle: Path,
    runtime: str,
    capabilities: tuple[str, ...],
    workspace_mib: int | None,
    optimization_level: int,
    ignore_memory: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Build the TensorRT engines of BUNDLE; engines that are still valid are kept.

    An interrupted build goes on where it stopped. Exit code 5 means memory or disk did not suffice.
    """
    import json

    from tmc_export.bundle.read import open_manifest
    from tmc_export.engine import EngineOptions, build_engines
    from tmc_export.engine.bundle import default_capabilities

    open_manifest(bundle)
    options = EngineOptions(
        flavour=runtime,
        capabilities=capabilities or (default_capabilities(bundle) if runtime == "tensorrt-rtx" else ()),
        workspace_mib=workspace_mib,
        builder_optimization_level=optimization_level,
        timing_cache=bundle / "engines" / "timing.cache" if runtime == "tensorrt" else None,
        check_memory=not ignore_memory,
    )
    shown: set[str] = set()

    def progress(name: str, phase: str, done: int, total: int) -> None:
        if name not in shown:
            shown.add(name)
            click.echo(f"building {name} ...", err=True)

    reports = build_engines(bundle, options, progress, force=force)
    if as_json:
        fields = [
            {
                "name": report.name,
                "file": report.path.relative_to(bundle).as_posix(),
                "runtime": report.flavour,
                "version": report.version,
                "capabilities": list(report.capabilities),
                "bytes": report.size,
                "seconds": report.seconds,
                "peak_rss_bytes": report.peak_rss,
                "activation_bytes": list(report.activation_bytes),
                "multi_head_attention": report.multi_head_attention,
                "profiles": list(report.profiles),
                "built": report.built,
            }
            for report in reports
        ]
        click.echo(json.dumps(fields, indent=1))
        return
    for report in reports:
        state = f"built in {report.seconds:.1f} s, peak {report.peak_rss / 2**30:.1f} GiB" if report.built else "kept"
        click.echo(
            f"{report.name}: {report.size / 2**20:.1f} MiB, profiles {', '.join(report.profiles)}, "
            f"{report.multi_head_attention} fused attention, {state}"
        )
        for warning in report.warnings if report.built else ():
            click.echo(f"  warning: {warning}", err=True)
    for first in reports[:1]:
        target = ", ".join(first.capabilities) or "this GPU"
        click.echo(f"{len(reports)} engines for {target}, {first.flavour} {first.version}; built, not run")
