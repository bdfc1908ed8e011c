"""Write docs/cli.md from the click commands, or say that it is out of date.

python tools/generate_cli_reference.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import click

from tmc_export.cli import main as tmc_export

__all__ = ["main", "reference"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# Command line

Written by `make cli-reference` from the commands themselves; do not edit.
"""


def _help(command: click.Command, name: str, parent: click.Context | None) -> str:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100, max_content_width=100, **command.context_settings)
    lines = (line.rstrip() for line in command.get_help(context).splitlines())
    return "\n".join(["```text", *lines, "```"])


def reference() -> str:
    """Return the page."""
    root = click.Context(tmc_export, info_name="tmc-export")
    parts = [HEAD, _help(tmc_export, "tmc-export", None)]
    for verb in tmc_export.list_commands(root):
        command = tmc_export.get_command(root, verb)
        if command is None:
            raise RuntimeError(f"the verb '{verb}' is listed and cannot be found")
        parts += ["", f"## {verb}", "", _help(command, verb, root)]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; end with code 1 when the page is out of date")
    check = parser.parse_args().check
    if not check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(reference(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != reference():
        print("docs/cli.md is out of date; run: make cli-reference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
