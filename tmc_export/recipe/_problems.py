"""Turns what pydantic found into lines a person can act on: place, key, value received, what is allowed, nearest name."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from tmc_export.core.errors import RecipeError
from tmc_export.core.registry import nearest
from tmc_export.recipe._origin import Origin, Origins, Path, printable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["check_version", "dotted", "shown_value", "validate"]

M = TypeVar("M", bound=BaseModel)

_WANTED = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping of keys to values",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "list_type": "must be a list",
    "model_type": "must be a mapping of keys to values",
    "string_type": "must be text",
    "tuple_type": "must be a list",
}
_BOUNDS = {"greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")}


def validate(model: type[M], data: dict[str, JsonValue], origins: Origins) -> M:
    """Check `data` against `model`.

    Raises:
        RecipeError: one line per problem, in the order of the file.
    """
    try:
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        lines = sorted({_line(model, data, origins, found) for found in error.errors(include_url=False)})
    raise RecipeError("\n".join(f"{origin}: {printable(text)}" for origin, text in lines))


def check_version(kind: str, known: int, data: dict[str, JsonValue], origins: Origins) -> None:
    """Refuse a file without its schema version, or of a newer one, before anything else in it is looked at."""
    place = origins.at((kind,))
    if kind not in data:
        raise RecipeError(f"{place}: the schema version is missing; start the file with '{kind}: {known}'{nearest(kind, data)}")
    version = data[kind]
    if type(version) is int and version > known:
        raise RecipeError(f"{place}: {kind} schema {version} is newer than this tmc-export reads (up to {known}); upgrade tmc-export")
    if type(version) is not int or version != known:
        raise RecipeError(f"{place}: '{kind}' is the schema version and must be {known}, got {shown_value(version)}")


def dotted(path: Path) -> str:
    """Write a path as `--set` takes it: `compress.0.keep`."""
    return ".".join(str(part) for part in path)


def shown_value(value: JsonValue) -> str:
    """Write a value as it may stand in a message, at most 60 characters."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def _line(model: type[BaseModel], data: dict[str, JsonValue], origins: Origins, found: ErrorDetails) -> tuple[Origin, str]:
    kind = found["type"]
    path, value, reached = _locate(data, found["loc"], wants_parent=kind == "missing")
    name = dotted(path)
    if kind == "extra_forbidden":
        return origins.key(path), _unknown_key(model, path)
    if kind == "missing":
        return origins.at(path), _missing(model, path, str(found["loc"][-1]), value)
    if not reached:
        value = found["input"]
    context = found.get("ctx", {})
    got = f"got {shown_value(value)}"
    if kind == "literal_error":
        expected = str(context["expected"])
        hint = nearest(value, re.findall(r"'([^']*)'", expected)) if isinstance(value, str) else ""
        text = f"{name} must be {expected}, {got}{hint}"
    elif kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        text = f"{name} must be {words} {int(bound) if bound == int(bound) else bound}, {got}"
    elif kind == "string_too_short":
        text = f"{name} must not be empty"
    elif kind in _WANTED:
        text = f"{name} {_WANTED[kind]}, {got}"
    else:
        text = f"{name}: {found['msg'].removeprefix('Value error, ')}"
    return origins.at(path), text


def _locate(data: JsonValue, loc: tuple[int | str, ...], wants_parent: bool) -> tuple[Path, JsonValue, bool]:
    """Follow `loc` as far as the data goes: pydantic appends parts that name types, not keys."""
    path: Path = ()
    for part in loc[:-1] if wants_parent else loc:
        if isinstance(data, dict) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return path, data, False
        path = (*path, part)
    return path, data, True


def _unknown_key(model: type[BaseModel], path: Path) -> str:
    allowed = list(_model_at(model, path[:-1]).model_fields)
    where = f"in {dotted(path[:-1])}" if len(path) > 1 else "at the top level"
    return f"unknown key '{path[-1]}' {where}{nearest(str(path[-1]), allowed)}; allowed: {', '.join(allowed)}"


def _missing(model: type[BaseModel], path: Path, key: str, holder: JsonValue) -> str:
    where = f"in {dotted(path)}" if path else "at the top level"
    fields = _model_at(model, path).model_fields
    others = [name for name in holder if name not in fields] if isinstance(holder, dict) else []
    close = nearest(key, others).replace("did you mean", "is it meant by")
    about = fields[key].description if key in fields else None
    return f"the key '{key}' is missing {where}{close}" + (f"; it is {about}" if about else "")


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel]:
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        found = next(_models_in(field.annotation), None) if field is not None else None
        if found is None:
            return model
        model = found
    return model


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)
