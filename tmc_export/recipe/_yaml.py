"""Reads a small YAML file safely: plain data, the place of every value, and one clear line for whatever is wrong with the text.

The nodes are turned into data here and not by a constructor of the library: no tag is honoured, no anchor expanded, no key
dropped, and every value keeps its line and column.
"""

from __future__ import annotations

import math
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from tmc_export.core.errors import RecipeError
from tmc_export.recipe._origin import Origin, Origins, Path, printable

if TYPE_CHECKING:
    from pydantic import JsonValue
    from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

__all__ = ["MAX_BYTES", "display_name", "parse_yaml", "read_yaml"]

MAX_BYTES = 1 << 20
"""The largest file read, in bytes: a recipe is a page of text, anything larger is a mistake."""

_PREFIX = "tag:yaml.org,2002:"


def display_name(path: FilePath) -> str:
    """Return how messages name a file: relative to the working directory when it lies below it."""
    try:
        return path.resolve().relative_to(FilePath.cwd()).as_posix() if path.is_absolute() else path.as_posix()
    except (ValueError, OSError, RuntimeError):
        return path.as_posix()


def read_yaml(path: FilePath, kind: str) -> tuple[dict[str, JsonValue], Origins]:
    """Read a file whose top level is a mapping.

    Args:
        path: the file.
        kind: what it is, for messages: `"recipe"`.

    Returns:
        the data, and the place of every value in it.

    Raises:
        RecipeError: the file is missing, a folder, too large, not UTF-8, empty, not YAML or not a mapping; one line.
    """
    shown = display_name(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise RecipeError(f"{shown}: is a folder, not a {kind}; name a .yaml file in it") from error
    except FileNotFoundError as error:
        raise RecipeError(f"{shown}: no such {kind} file; check the path, or list the shipped ones with: tmc-export {kind}s") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{shown!s:.200}: cannot read the {kind}: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{shown}: is too large for a {kind} (more than {MAX_BYTES} bytes); is it the right file?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        column = len(before.rpartition(b"\n")[2].decode("utf-8", "replace")) + 1
        place = Origin(shown, before.count(b"\n") + 1, column)
        raise RecipeError(f"{place}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text") from error
    data, origins = parse_yaml(text, shown)
    if data is None:
        raise RecipeError(f"{origins.root}: the file is empty; a {kind} starts with '{kind}: 1'")
    if not isinstance(data, dict):
        raise RecipeError(f"{origins.at(())}: a {kind} is a mapping of keys to values, got {_kind_of(data)}; it starts with '{kind}: 1'")
    return data, origins


def parse_yaml(text: str, shown: str) -> tuple[JsonValue, Origins]:
    """Turn YAML text into plain data and its places; `shown` names the text in messages.

    Raises:
        RecipeError: a syntax error, a duplicate key, an anchor, a tag or a value that is no plain data; one line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    root = Origin(shown)
    reader = _Reader(shown)
    try:
        node = YAML(typ="safe", pure=True).compose(text)
        data = None if node is None else reader.read(node, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Origin(shown, mark.line + 1, mark.column + 1) if mark else root
        raise RecipeError(f"{place}: not valid YAML: {_explain(str(error.problem or error.context or 'syntax error'))}") from error
    except RecursionError as error:
        raise RecipeError(f"{root}: not valid YAML: nested too deeply") from error
    except YAMLError as error:
        position = getattr(error, "position", None)
        before = text[:position] if isinstance(position, int) else ""
        place = Origin(shown, before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1) if isinstance(position, int) else root
        raise RecipeError(f"{place}: not valid YAML: {printable(' '.join(str(getattr(error, 'reason', error)).split()))}") from error
    return data, Origins(root, reader.values, reader.keys)


def _explain(problem: str) -> str:
    """Put the library's words on one line and add the fix for the commonest slips."""
    problem = printable(" ".join(problem.split()))
    if "\\t" in problem or "\t" in problem:
        return f"{problem}; indent with spaces, not tabs"
    if "another document" in problem:
        return "a second document starts here; keep one per file, remove this '---'"
    if "mapping values are not allowed" in problem:
        return f"{problem}; put text that contains ': ' in quotes"
    return problem


def _kind_of(value: JsonValue) -> str:
    return {list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}.get(type(value), "null")


def _shown_key(node: Node) -> str:
    return "a list or mapping" if isinstance(node.value, list) else f"'{printable(str(node.value)[:40])}'"


class _Reader:
    """Walks the nodes of one document and remembers where each value stands."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.values: dict[Path, Origin] = {}
        self.keys: dict[Path, Origin] = {}

    def place(self, node: Node) -> Origin:
        return Origin(self.shown, node.start_mark.line + 1, node.start_mark.column + 1)

    def read(self, node: Node, path: Path) -> JsonValue:
        """Return the data of `node`, which stands at `path`."""
        from ruamel.yaml.nodes import MappingNode, SequenceNode

        place = self.place(node)
        if node.anchor is not None:
            raise RecipeError(f"{place}: anchors and aliases are not used here, got '&{printable(node.anchor)}'; write the value out")
        self.values.setdefault(path, place)
        if isinstance(node, MappingNode):
            self._plain(node, "map", place)
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            self._plain(node, "seq", place)
            return self._sequence(node, path)
        return self._scalar(node, place)

    def _plain(self, node: Node, name: str, place: Origin) -> None:
        if str(node.tag) != _PREFIX + name:
            raise RecipeError(f"{place}: tags are not used here, got '{printable(node.tag)}'; write plain YAML")

    def _mapping(self, node: MappingNode, path: Path) -> JsonValue:
        result: dict[str, JsonValue] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            key = self._scalar(key_node, place) if not isinstance(key_node.value, list) else None
            if not isinstance(key, str):
                raise RecipeError(f"{place}: a key must be text, got {_shown_key(key_node)}; put it in quotes")
            below = (*path, key)
            if key in result:
                raise RecipeError(f"{place}: duplicate key '{printable(key)}', first written at {self.keys[below]}; remove one of them")
            self.keys[below] = place
            self.values[below] = self.place(value_node) if value_node.start_mark.line == key_node.start_mark.line else place
            result[key] = self.read(value_node, below)
        return result

    def _sequence(self, node: SequenceNode, path: Path) -> JsonValue:
        return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]

    def _scalar(self, node: Node, place: Origin) -> JsonValue:
        tag, text = str(node.tag).removeprefix(_PREFIX), str(node.value)
        if tag in ("str", "timestamp", "value"):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise RecipeError(f"{place}: text with half a character (a lone surrogate); write the character itself")
            return text
        if tag == "null":
            return None
        if tag == "bool" and text.lower() in ("true", "yes", "on", "false", "no", "off"):
            return text.lower() in ("true", "yes", "on")
        if tag in ("int", "float"):
            return self._number(tag, text, place)
        if tag == "merge":
            raise RecipeError(f"{place}: merge keys ('<<') are not used here; write the keys out")
        raise RecipeError(f"{place}: tags are not used here, got '{printable(node.tag)}'; write plain YAML")

    def _number(self, tag: str, text: str, place: Origin) -> int | float:
        digits = text.replace("_", "").lower()
        try:
            if tag == "int":
                return int(digits, 0) if digits.lstrip("+-")[:2] in ("0x", "0o", "0b") else int(digits)
            number = float(digits)
        except ValueError as error:
            raise RecipeError(
                f"{place}: '{printable(text[:40])}' is not a number that can be used; write a finite decimal number"
            ) from error
        if not math.isfinite(number):
            raise RecipeError(f"{place}: '{printable(text[:40])}' is not a finite number; write a finite decimal number")
        return number
