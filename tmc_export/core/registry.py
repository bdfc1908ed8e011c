"""Registries by name: duplicates raise, an unknown name lists the choices and the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from tmc_export.core.errors import TmcError

__all__ = ["Registry", "nearest"]

T = TypeVar("T")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Say which choice `name` may have meant: `"; did you mean 'fastv'?"`, or an empty string when none is near.

    >>> nearest("fastvv", ["fastv", "pool"])
    "; did you mean 'fastv'?"
    """
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


class Registry(Generic[T]):
    """Named things of one kind, each defined in one place.

    Args:
        kind: what is registered, for messages: `"method"`.
        load: called once before the first look-up; imports the modules that register themselves.
    """

    def __init__(self, kind: str, load: Callable[[], None] | None = None) -> None:
        self.kind = kind
        self._load = load
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument under `name`; a second one of that name raises `ValueError`."""

        def add(item: T) -> T:
            present = self._items.get(name)
            if present is not None and getattr(present, "__qualname__", None) != getattr(item, "__qualname__", ""):
                raise ValueError(f"{self.kind} '{name}' is registered twice: {present!r} and {item!r}; rename one of them")
            self._items[name] = item
            return item

        return add

    def _loaded(self) -> dict[str, T]:
        if self._load is not None:
            load, self._load = self._load, None
            load()
        return self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __contains__(self, name: object) -> bool:
        return name in self._loaded()

    def get(self, name: str) -> T:
        """Return what is registered under `name`.

        Raises:
            TmcError: the name is unknown; lists the choices and the nearest one.
        """
        items = self._loaded()
        if name not in items:
            raise TmcError(f"unknown {self.kind} '{name}'{nearest(name, items)}; choose one of: {', '.join(sorted(items))}")
        return items[name]
