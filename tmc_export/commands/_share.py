"""`40%` → 0.4, for options that take a share."""

from __future__ import annotations

import click

__all__ = ["share"]


def share(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Read a percentage.

    Raises:
        BadParameter: it is none.
    """
    if value is None:
        return None
    try:
        if value.strip().endswith("%"):
            return float(value.strip()[:-1]) / 100
    except ValueError:
        pass
    raise click.BadParameter(f"{value!r} is no share; write a percentage such as 40%")
