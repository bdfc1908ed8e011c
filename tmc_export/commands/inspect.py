"""`tmc-export inspect`: what a bundle consists of."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--operators", is_flag=True, help="Count the operators of every subgraph (reads the graphs; needs the extra 'export').")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(bundle: str, operators: bool, as_json: bool) -> None:
    """List the subgraphs of BUNDLE with shapes, sizes and, if asked for, operators."""
    import json

    from tmc_export.report.inspect import describe, render

    found = describe(bundle, operators=operators)
    click.echo(json.dumps(found, indent=2) if as_json else render(found))
