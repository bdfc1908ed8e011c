"""`tmc-export plan`: what a recipe will cost, before any weight is read."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command()
@click.argument("recipe")
@click.option("--device", help="Plan for this device, with its own runtime, instead of the recipe's.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe, such as compress.0.keep=25%.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(recipe: str, device: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what RECIPE, a file or the name of a shipped recipe, comes to on its device.

    Tokens per stage, memory, operations, the estimated time to the first token and per token, and the same uncompressed. Reads the model's
    JSON files, no weights; needs no torch. Where TensorRT-RTX engines are built, this machine is taken for the one that builds them unless
    the recipe's target.build_memory_gib names another's memory. Exit code 3: it cannot work on this model or device.
    """
    import json

    from tmc_export.plan.describe import report_json
    from tmc_export.plan.make import device_settings, for_this_builder, report_plan
    from tmc_export.plan.source import fetch, read_model_files
    from tmc_export.recipe import load_recipe

    settings = (*(device_settings(device) if device else ()), *overrides)
    loaded = for_this_builder(load_recipe(recipe, settings))
    report = report_plan(loaded, read_model_files(fetch(loaded, weights=False)))
    if as_json:
        click.echo(json.dumps(report_json(report), indent=2, ensure_ascii=False))
        return
    from tmc_export.commands._plan_table import show

    show(report)
