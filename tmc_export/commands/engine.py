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
@click.option("--force", is_flag=True, help="Build again what is still valid, and what the cache has.")
@click.option(
    "--cache/--no-cache",
    "use_cache",
    default=True,
    help="Take engines that this machine has built before from its cache, and keep new ones there; by default, it does.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON.")
def command(
    bundle: Path,
    runtime: str,
    capabilities: tuple[str, ...],
    workspace_mib: int | None,
    optimization_level: int,
    ignore_memory: bool,
    force: bool,
    use_cache: bool,
    as_json: bool,
) -> None:
    """Build the TensorRT engines of BUNDLE; engines that are still valid are kept.

    A build that is interrupted or killed goes on where it stopped, engine by engine; of two at once, the second waits. Engines are also
    kept by what they are made of, in TMC_EXPORT_CACHE_DIR (~/.cache/tmc-export) and up to TMC_EXPORT_CACHE_GIB (16; 0: none). Exit code 5
    means memory or disk did not suffice.
    """
    import json

    from tmc_export.bundle.read import open_manifest
    from tmc_export.engine import WAITING, EngineOptions, build_engines, engine_cache
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
        if phase == WAITING:
            click.echo(f"{name}: {phase} ...", err=True)
        elif name not in shown:
            shown.add(name)
            click.echo(f"building {name} ...", err=True)

    reports = build_engines(bundle, options, progress, force=force, cache=engine_cache() if use_cache else None)
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
                "cached": report.cached,
            }
            for report in reports
        ]
        click.echo(json.dumps(fields, indent=1))
        return
    for report in reports:
        state = "from the cache" if report.cached else "kept"
        if report.built:
            state = f"built in {report.seconds:.1f} s, peak {report.peak_rss / 2**30:.1f} GiB"
        click.echo(
            f"{report.name}: {report.size / 2**20:.1f} MiB, profiles {', '.join(report.profiles)}, "
            f"{report.multi_head_attention} fused attention, {state}"
        )
        for warning in report.warnings if report.built else ():
            click.echo(f"  warning: {warning}", err=True)
    for first in reports[:1]:
        target = ", ".join(first.capabilities) or "this GPU"
        click.echo(f"{len(reports)} engines for {target}, {first.flavour} {first.version}; built, not run")
