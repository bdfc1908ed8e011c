"""Reads `engines/profiles.json`: which graphs become engines, with which static shapes."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from tmc_export.core.errors import BundleError
from tmc_export.engine._wire import profiles_from
from tmc_export.engine.options import Subgraph

__all__ = ["PROFILES", "read_profiles"]

PROFILES = "engines/profiles.json"
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def read_profiles(bundle: Path) -> tuple[Subgraph, ...]:
    """Return the subgraphs of a bundle in the order of the file.

    Raises:
        BundleError: the file is missing or of another form, a name is used twice, or a path leaves the bundle.
    """
    path = bundle / PROFILES
    try:
        items = json.loads(path.read_text())["subgraphs"]
        subgraphs = tuple(
            Subgraph(str(item["name"]), str(item["onnx"]), str(item["precision"]), profiles_from(item["profiles"])) for item in items
        )
    except OSError as error:
        raise BundleError(f"'{path}' cannot be read ({error.strerror}); is '{bundle}' a bundle? build it again") from error
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise BundleError(f"'{path}' is not of the form this version writes ({what}); build the bundle again") from error
    if not subgraphs:
        raise BundleError(f"'{path}' names no subgraph; build the bundle again")
    names = [subgraph.name for subgraph in subgraphs]
    for subgraph in subgraphs:
        parts = PurePosixPath(subgraph.onnx)
        if parts.is_absolute() or ".." in parts.parts or not _NAME.issuperset(subgraph.onnx.replace("/", "").replace(".", "")):
            raise BundleError(f"'{path}': the graph '{subgraph.onnx}' of {subgraph.name} is no path inside the bundle")
        if not subgraph.name or not _NAME.issuperset(subgraph.name) or names.count(subgraph.name) > 1:
            raise BundleError(f"'{path}': '{subgraph.name}' is empty, used twice, or holds other than letters, digits, '_' and '-'")
        if not subgraph.profiles:
            raise BundleError(f"'{path}': {subgraph.name} has no profile; build the bundle again")
    return subgraphs
