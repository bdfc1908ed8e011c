"""`tmc-export fit`: options that are found on calibration prompts."""

from __future__ import annotations

import click

from tmc_export.commands._share import share

__all__ = ["command"]


@click.command()
@click.argument("recipe")
@click.option("-o", "--output", "output", type=click.Path(), help="The recipe to write; RECIPE's name with -fitted by default.")
@click.option("--pictures", type=click.Path(), metavar="DIR", help="Calibration pictures; those of the checkout by default.")
@click.option(
    "--prompts",
    type=click.Path(),
    metavar="FILE",
    help="Questions: JSON with picture and question, or text with one a line, asked about every picture; DIR/questions.json by default.",
)
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="Prompts at most, spread over what there is.")
@click.option("--entry", type=int, metavar="N", help="Which entry of compress, from 0; only needed where several can be fitted.")
@click.option(
    "--flops",
    callback=share,
    metavar="SHARE",
    help="Goal: the share of the decoder layers' operations in a full prefill that stays, such as 40%.",
)
@click.option(
    "--divergence",
    type=float,
    metavar="NATS",
    help="Goal: the change of the first answer token's distribution (Kullback-Leibler) stays below.",
)
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(
    recipe: str,
    output: str | None,
    pictures: str | None,
    prompts: str | None,
    samples: int,
    entry: int | None,
    flops: float | None,
    divergence: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Find what an entry of RECIPE leaves to data, and write a copy of the recipe with it.

    The model runs on a few prompts with a picture each, in float32 on the CPU, as often as the method asks; `tmc-export methods NAME` says
    what it fits, to which goal, and how. Comments stay as they are. Nothing is written before the fitted recipe has its plan. Exit code 3:
    the goal cannot be met.
    """
    import json
    from dataclasses import asdict

    from tmc_export.api.fitting import fit_recipe

    def say(line: str) -> None:
        if not as_json:
            click.echo(f"{line} ...", err=True)

    goals = {name: value for name, value in (("flops", flops), ("divergence", divergence)) if value is not None}
    result = fit_recipe(
        recipe, output, entry=entry, goals=goals, pictures=pictures, prompts=prompts, samples=samples, force=force, progress=say
    )
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2, ensure_ascii=False))
        return
    table = (result.columns, *result.rows)
    widths = [max(len(row[column]) for row in table) for column in range(len(result.columns))]
    for row in table:
        click.echo("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    fitted = ", ".join(f"{key}: {json.dumps(value)}" for key, value in {"at": result.at, **result.options}.items())
    click.echo(
        f"decoder layers, full prefill: {result.operations:.1%} of the operations stay; the cuts cost another {result.cuts:.1%} of them"
    )
    click.echo(f"{result.recipe}: compress.{result.entry} {result.method} {fitted} ({result.prompts} prompts)")
    click.echo("comments were copied; mend those that speak of the old values", err=True)
