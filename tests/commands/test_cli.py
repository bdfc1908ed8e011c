"""The command line's frame: verbs found by file, one line per error, exit codes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tmc_export import cli
from tmc_export.core.errors import LegalityError, ParityError, TmcError


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.main, list(args), prog_name="tmc-export")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], tuple[int, str, str]]:
    """Run a verb that raises what it is given."""

    def go(error: BaseException) -> tuple[int, str, str]:
        @click.command()
        def command() -> None:
            raise error

        monkeypatch.setattr(cli.Verbs, "get_command", lambda self, ctx, name: command)
        return run("methods")

    return go


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TmcError("r=9 exceeds n//2=8; lower r"), 2, "error: r=9 exceeds n//2=8; lower r\n"),
        (LegalityError("fp8 on Orin"), 3, "error: fp8 on Orin\n"),
        (ParityError("block.1 differs"), 4, "error: block.1 differs\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.onnx"), 5, None),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x.onnx"), 5, None),
        (PermissionError(errno.EACCES, "Permission denied", "x.onnx"), 2, "error: Permission denied: x.onnx\n"),
        (MemoryError("Unable to allocate 8 GiB"), 5, None),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_error_is_one_line_and_a_code(
    raising: Callable[[BaseException], tuple[int, str, str]], error: BaseException, code: int, line: str | None
) -> None:
    got, out, err = raising(error)
    assert got == code
    assert out == ""
    assert err.strip().count("\n") == 0 and err.strip().startswith("error: ")
    if line is not None:
        assert err == line


def test_full_disk_names_the_file_and_the_fix(raising: Callable[[BaseException], tuple[int, str, str]]) -> None:
    _, _, err = raising(OSError(errno.ENOSPC, "No space left on device", "x.onnx"))
    assert "x.onnx" in err and "free some space" in err


def test_a_bug_keeps_its_traceback(raising: Callable[[BaseException], tuple[int, str, str]]) -> None:
    result = raising(ZeroDivisionError("a fault of ours"))
    assert result[0] == 1 and "error:" not in result[2]


def test_unknown_verb_names_the_nearest() -> None:
    code, _, err = run("metods")
    assert code == 2 and "did you mean 'methods'?" in err and err.strip().count("\n") == 0


def test_unknown_option_is_one_line() -> None:
    code, _, err = run("methods", "--jsn")
    assert code == 2 and err.startswith("error: ") and "tmc-export methods --help" in err and err.strip().count("\n") == 0


def test_version() -> None:
    from tmc_export import __version__

    assert run("--version")[:2] == (0, f"tmc-export, version {__version__}\n")


def test_every_file_is_a_verb(repository: Path) -> None:
    files = {p.stem.replace("_", "-") for p in (repository / "tmc_export" / "commands").glob("[!_]*.py")}
    assert files == set(cli.main.list_commands(click.Context(cli.main)))
    assert "methods" in files


def test_methods_lists_every_method_file(repository: Path) -> None:
    listed = {entry["name"] for entry in json.loads(run("methods", "--json")[1])}
    assert listed and len(listed) == len(list((repository / "graphs").glob("[!_]*.py")))
    text = run("methods")[1]
    assert {line.split()[0] for line in text.splitlines()} == listed


def test_methods_shows_one() -> None:
    from tmc_export.graphs import METHODS

    name = next(iter(METHODS))
    code, out, _ = run("methods", name)
    assert code == 0 and out.startswith(f"name: {name}\n") and METHODS.get(name).paper in out
    shown = json.loads(run("methods", name, "--json")[1])
    assert shown["name"] == name and set(shown["options"].get("properties", {})) == set(METHODS.get(name).Config.model_fields)


def test_methods_refuses_an_unknown_name() -> None:
    code, out, err = run("methods", "no-such-method")
    assert code == 2 and out == "" and "unknown method 'no-such-method'" in err
