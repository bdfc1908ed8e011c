"""`tmc-export methods`: the compression methods a recipe may name."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tmc_export.graphs._contract import Method

__all__ = ["command"]


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(name: str | None, as_json: bool) -> None:
    """List the compression methods, or show one: its paper, sites, options and limits."""
    from tmc_export.graphs import METHODS

    if name is not None:
        method = METHODS.get(name)
        click.echo(json.dumps({**_facts(method), "options": method.Config.model_json_schema()}, indent=2) if as_json else _page(method))
        return
    methods = [METHODS.get(each) for each in METHODS]
    if as_json:
        click.echo(json.dumps([_facts(method) for method in methods], indent=2))
        return
    width = max((len(method.name) for method in methods), default=0)
    for method in methods:
        click.echo(f"{method.name:<{width}}  {method.mechanism:<10}  {method.modality:<5}  {', '.join(method.sites)}")


def _facts(method: type[Method]) -> dict[str, object]:
    return {
        "name": method.name,
        "paper": method.paper,
        "official": method.official,
        "mechanism": method.mechanism,
        "modality": method.modality,
        "sites": list(method.sites),
        "query_aware": method.query_aware,
        "training_free": method.training_free,
        "fitted": list(method.fitted),
        "goals": [f"{name} {value:g}" for name, value in method.goals.items()],
    }


def _page(method: type[Method]) -> str:
    """Return the method's facts, options and docstring as text."""
    lines = [f"{key}: {', '.join(value) if isinstance(value, list) else value}" for key, value in _facts(method).items()]
    lines.append("options:")
    for option, field in method.Config.model_fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)}"
        lines.append(f"  {option} ({default}){': ' + field.description if field.description else ''}")
    return "\n".join([*lines, "", inspect.getdoc(method) or ""]).rstrip()
