"""The command line: finds the verbs, runs one, and turns its errors into one line and an exit code.

Every verb is a file `tmc_export/commands/<verb>.py` that exposes a click command named `command`; adding a verb is adding a file.
"""

from __future__ import annotations

import errno
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from tmc_export import __version__
from tmc_export import commands as _commands
from tmc_export.core.errors import TmcError
from tmc_export.core.registry import nearest

__all__ = ["Verbs", "main"]

USAGE, RESOURCES, INTERRUPTED = 2, 5, 130
_NO_MEMORY = "can't allocate memory"
"""What torch says instead of raising MemoryError."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}
_FIXES = {
    errno.ENOSPC: "; free some space, or choose another folder",
    errno.EDQUOT: "; free some space, or choose another folder",
    errno.EFBIG: "; raise the limit on the size of files (ulimit -f), or choose another file system",
}


class Verbs(click.Group):
    """A group that imports a verb's file when the verb is asked for, and ends every user-facing error in one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs: the public modules of `tmc_export.commands`, `_` written as `-`."""
        return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(_commands.__path__) if not m.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and return its `command`; None when there is no such verb."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = import_module(f"tmc_export.commands.{cmd_name.replace('-', '_')}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"tmc_export.commands.{cmd_name}: 'command' is {command!r}, not a click command")
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb that `args` opens with.

        Raises:
            click.UsageError: there is no such verb; lists the verbs and the nearest one.
        """
        verbs = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in verbs:
            raise click.UsageError(f"unknown command '{args[0]}'{nearest(args[0], verbs)}; choose one of: {', '.join(verbs)}", ctx)
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its code; with `standalone_mode=False` errors are raised instead."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(USAGE)
        except click.ClickException as error:
            _fail(_one_line(error), USAGE)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", INTERRUPTED)
        except TmcError as error:
            _fail(str(error), error.exit_code)
        except MemoryError as error:
            _fail(f"out of memory: {error or 'an allocation was refused'}; free memory, or build on a larger machine", RESOURCES)
        except RuntimeError as error:
            if _NO_MEMORY not in str(error):
                raise
            _fail(f"out of memory: {str(error).splitlines()[0]}; free memory, or build on a larger machine", RESOURCES)
        except OSError as error:
            _fail(_describe(error), RESOURCES if error.errno in _NO_ROOM else USAGE)
        sys.exit(result if isinstance(result, int) else 0)


def _one_line(error: click.ClickException) -> str:
    """Return a usage error on one line that ends in where to look."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    where = f" (see '{context.command_path} --help')" if context else ""
    return f"{' '.join(error.format_message().split())}{where}"


def _describe(error: OSError) -> str:
    """Return one line for an operating-system error: what, which file, and the fix where it is known."""
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{place}{_FIXES.get(error.errno or 0, '')}"


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


@click.group(cls=Verbs)
@click.version_option(__version__, prog_name="tmc-export")
def main() -> None:
    """Compile multimodal LLMs, with visual-token compression, into verified bundles for Jetson and RTX.

    Exit codes: 0 ok, 2 usage or recipe, 3 not legal on this device or model, 4 parity, 5 resources, 130 interrupted.
    """


if __name__ == "__main__":
    main(prog_name="tmc-export")
