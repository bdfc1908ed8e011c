"""`tmc-export quantize`: what a recipe's quantization does to answers, and what must stay in the base precision."""

from __future__ import annotations

import click

from tmc_export.commands._share import share

__all__ = ["command"]


@click.command()
@click.argument("recipe")
@click.option("--explain", is_flag=True, help="Say which units hurt: each rounded alone, the worst first, then everything together.")
@click.option(
    "--budget",
    callback=share,
    metavar="SHARE",
    help="Write a copy of RECIPE that keeps as few units as it takes, so that at most this share of the answers changes, such as 0.5%.",
)
@click.option("-o", "--output", "output", type=click.Path(), help="The recipe that --budget writes; RECIPE's name with -fitted by default.")
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--samples", type=click.IntRange(min=1), help="Questions at most; all by default.")
@click.option("--images", type=click.Path(), metavar="DIR", help="Pictures for --prompts.")
@click.option(
    "--prompts", type=click.Path(), metavar="FILE", help="Questions, one JSON object a line; those of quantize.calibration by default."
)
@click.option("--by", type=click.Choice(["layer", "linear", "part"]), default="layer", show_default=True, help="What a unit is.")
@click.option("--answers", is_flag=True, help="Decode the rows' answers, too; without it their first tokens are compared.")
@click.option("--tokens", type=click.IntRange(min=1), default=8, show_default=True, help="Tokens of an answer, at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(
    recipe: str,
    explain: bool,
    budget: float | None,
    output: str | None,
    force: bool,
    samples: int | None,
    images: str | None,
    prompts: str | None,
    by: str,
    answers: bool,
    tokens: int,
    as_json: bool,
) -> None:
    """Measure what RECIPE's quantization does to answers, without building it.

    Questions are answered in float32 with the weights of some units rounded as a bundle holds them, end to end and with float32's
    selections held, and compared with the same in float32. Nothing is written but by --budget. Exit code 3: a budget that cannot be met,
    or that the questions are too few for.
    """
    import json
    from dataclasses import asdict
    from typing import get_args

    if explain == (budget is not None):
        raise click.UsageError("give --explain or --budget SHARE, one of them")
    if budget is not None and answers:
        raise click.UsageError("--answers goes with --explain; --budget decodes answers as it is")
    if explain and (output is not None or force):
        raise click.UsageError("-o and --force go with --budget; --explain writes nothing")

    def say(line: str) -> None:
        if not as_json:
            click.echo(f"{line} ...", err=True)

    from tmc_export.api.budget import fit_budget
    from tmc_export.api.sensitivity import explain as explained
    from tmc_export.api.sensitivity import questions_of
    from tmc_export.api.units import By
    from tmc_export.commands._quantize_table import budget_lines, explained_json, explained_lines
    from tmc_export.recipe import load_recipe

    unit: By = next(name for name in get_args(By) if name == by)
    if budget is not None:
        result = fit_budget(
            recipe, budget, output, by=unit, samples=samples, images=images, prompts=prompts, tokens=tokens, force=force, progress=say
        )
        text, data = budget_lines(result), asdict(result)
    else:
        loaded = load_recipe(recipe)
        found = explained(loaded, questions_of(loaded, samples, images, prompts), by=unit, answers=answers, tokens=tokens, progress=say)
        text, data = explained_lines(found), explained_json(found)
    if as_json:
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    for line in text:
        click.echo(line)
    if budget is not None:
        click.echo("comments were copied; mend those that speak of the old values", err=True)
