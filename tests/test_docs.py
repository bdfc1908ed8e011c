"""The documents say what is so: the CLI reference is current, every command is explained, what they name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tmc_export.cli import main
from tools.generate_cli_reference import reference
from tools.generate_methods_table import page

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [p for name in ("README", "ARCHITECTURE", "CHANGELOG", "CONTRIBUTING") if (p := ROOT / f"{name}.md").is_file()]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
ADRS = sorted((ROOT / "docs" / "adr").glob("*.md"))


def commands(group: click.Group, path: str = "tmc-export") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, f"{path} lists '{name}' and cannot find it"
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


COMMANDS = dict(commands(main))


def broken_command(line: str) -> str | None:
    """Say what is wrong with a line `tmc-export …`: an unknown verb or option; None when it is right."""
    words = shlex.split(line, comments=True)
    assert words[0] == "tmc-export", line
    name, options = "tmc-export", [o for p in main.params for o in (*p.opts, *p.secondary_opts)] + ["--help"]
    for word in words[1:]:
        if f"{name} {word}" in COMMANDS:
            name = f"{name} {word}"
            options += [o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts)]
        elif name == "tmc-export" and not word.startswith("-"):
            return f"no command '{word}'"
        elif re.match(r"--?[a-z]", word) and word.split("=")[0] not in options:
            return f"'{name}' has no option {word}"
    return None


def command_lines(text: str) -> list[str]:
    """Return the `tmc-export …` lines of the fenced blocks, continued lines joined, prompts and paths before the name taken off."""
    blocks = re.findall(r"^```(?:console|bash|sh|shell)\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [m.group(1) for line in lines if (m := re.match(r"\s*(?:\$ )?(?:\S*/)?(tmc-export .*)", line))]


def test_cli_reference_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference(), "run: make cli-reference"


def test_the_table_of_methods_is_current() -> None:
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page(), "run: make methods-table"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help and command.help.strip().split("\n\n")[0].endswith("."), f"{name}: the help's first paragraph is a sentence"
    bare = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert not bare, f"{name}: options without help: {bare}"


def test_the_documents_are_there() -> None:
    names = {p.name for p in DOCUMENTS}
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "cli.md"} <= names
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_a_document_opens_with_its_title_and_its_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and len(text.splitlines()) >= 3
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    dead = [t for t in targets if not t.startswith(("http://", "https://", "mailto:")) and not (path.parent / t).exists()]
    assert not dead, f"{path.name}: links that lead nowhere: {dead}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_commands_of_a_document_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    wrong = {line: reason for line in command_lines(text) if (reason := broken_command(line))}
    assert not wrong
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {w for run in re.findall(r"`make ([a-z -]+)`", text) for w in run.split()}
    assert named <= targets, f"{path.name}: no such make target: {sorted(named - targets)}"


def test_each_recipe_opens_with_the_command_that_runs_it() -> None:
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    for path in recipes:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# tmc-export build ") and f"recipes/{path.name}" in first, f"{path.name}: {first}"
        if "tmc-export build" in COMMANDS:
            assert broken_command(first.removeprefix("# ")) is None, f"{path.name}: {first}"


@pytest.mark.parametrize("path", ADRS, ids=lambda p: p.name)
def test_an_adr_has_a_number_of_its_own(path: Path) -> None:
    assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", path.name)
    assert [p.name[:4] for p in ADRS].count(path.name[:4]) == 1
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {int(path.name[:4])}. ") and "\nStatus: " in text


def test_a_wrong_command_line_is_found() -> None:
    assert broken_command("tmc-export methods --json") is None
    assert broken_command("tmc-export methods fastv") is None
    assert broken_command("tmc-export metods") == "no command 'metods'"
    assert broken_command("tmc-export methods --jsn") == "'tmc-export methods' has no option --jsn"
    fenced = "```console\n$ .venv/bin/tmc-export methods \\\n    --jsn\n```\n```text\ntmc-export nonsense\n```\n"
    assert [broken_command(line) for line in command_lines(fenced)] == ["'tmc-export methods' has no option --jsn"]
