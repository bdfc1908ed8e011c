"""`tmc-export build`: a recipe becomes a bundle."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command()
@click.argument("recipe")
@click.option(
    "-o", "--output", "output", required=True, type=click.Path(), help="The bundle's folder; a bundle there is replaced at the end."
)
@click.option("--device", help="Build for this device instead of the recipe's.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe, such as compress.0.keep=25%.")
@click.option("--force", is_flag=True, help="Build even when the folder holds this very bundle.")
@click.option(
    "--engines/--no-engines", default=None, help="Build TensorRT-RTX engines; by default when the target's runtime is tensorrt-rtx."
)
@click.option("--record/--no-record", default=True, help="Run the PyTorch reference and keep its outputs for verify.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
def command(
    recipe: str, output: str, device: str | None, overrides: tuple[str, ...], force: bool, engines: bool | None, record: bool, quiet: bool
) -> None:
    """Compile RECIPE, a file or the name of a shipped recipe, into a bundle: one folder to copy to the device.

    Nothing is written to the folder until everything is built. A build that is interrupted or killed goes on where it stopped when it is
    started again; until then its work lies beside the folder, as .NAME.<key>.part, which the next build of NAME takes up or removes.
    """
    import time

    from tmc_export.api.bundling import build_bundle
    from tmc_export.core.interrupts import insistent
    from tmc_export.plan.make import device_settings

    began = time.perf_counter()

    def say(line: str) -> None:
        if not quiet:
            click.echo(f"{time.perf_counter() - began:7.1f} s  {line}", err=True)

    settings = [*overrides, *(device_settings(device) if device else ())]
    try:
        with insistent() as check:

            def progress(line: str) -> None:
                check()
                say(line)

            result = build_bundle(recipe, output, overrides=settings, force=force, progress=progress, record=record, engines=engines)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on where this one stopped")
        raise
    size = sum(entry.size for entry in result.manifest.files.values())
    state = "up to date" if result.cached else f"built in {time.perf_counter() - began:.1f} s"
    click.echo(f"{result.folder}: {state}, {len(result.manifest.files)} files, {size / 1e6:.1f} MB")
    for rung, outcome in result.manifest.proofs.items():
        click.echo(f"  {rung}: {outcome}")
