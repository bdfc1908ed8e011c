"""Where each value of a file was written, so that an error found much later can still point at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Origin", "Origins", "Path", "printable"]

Path = tuple[str | int, ...]


def printable(text: object) -> str:
    """Return text that stays on one line and cannot steer a terminal: what is not printable is escaped.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


@dataclass(frozen=True, order=True)
class Origin:
    """A place in a file.

    Attributes:
        file: the file as the user named it, or the whole `--set key=value` argument.
        line, column: 1-based; 0 when there is no position, as in a `--set` argument.

    >>> str(Origin("recipes/x.yaml", 14, 5))
    'recipes/x.yaml:14:5'
    >>> str(Origin("--set inputs.images=2"))
    '--set inputs.images=2'
    """

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Origins:
    """The places of one file, by path into its data.

    Attributes:
        root: the file itself.
        values: path → the value (or its key, when the value starts on a later line).
        keys: path → the key.
    """

    root: Origin
    values: Mapping[Path, Origin] = field(default_factory=dict)
    keys: Mapping[Path, Origin] = field(default_factory=dict)

    def at(self, path: Path) -> Origin:
        """Return the place of the value at `path`; a value that was not written has the place of what would hold it."""
        for end in range(len(path), -1, -1):
            found = self.values.get(path[:end])
            if found is not None:
                return found
        return self.root

    def key(self, path: Path) -> Origin:
        """Return the place of the key at `path`, or of its value when it has no key of its own (an item of a list)."""
        return self.keys.get(path) or self.at(path)

    def without(self, path: Path) -> Origins:
        """Return the places with the list item at `path` taken out: those behind it move up by one."""
        holder, index = path[:-1], path[-1]

        def moved(places: Mapping[Path, Origin]) -> dict[Path, Origin]:
            found: dict[Path, Origin] = {}
            for known, place in places.items():
                here = known[len(holder)] if len(known) > len(holder) and known[: len(holder)] == holder else None
                if not isinstance(here, int) or not isinstance(index, int) or here < index:
                    found[known] = place
                elif here > index:
                    found[(*holder, here - 1, *known[len(path) :])] = place
            return found

        return Origins(self.root, moved(self.values), moved(self.keys))

    def replaced(self, path: Path, origin: Origin) -> Origins:
        """Return a copy in which `path` and all below it come from `origin`."""
        values = {known: place for known, place in self.values.items() if known[: len(path)] != path}
        keys = {known: place for known, place in self.keys.items() if known[: len(path)] != path}
        values[path] = keys[path] = origin
        return Origins(self.root, values, keys)
