"""The errors of tmc-export: one root, one subclass per way to fail, each with the command line's exit code.

A message says what failed, the value received and how to fix it, on one line, so that it can be printed as it is.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "ExportError",
    "LegalityError",
    "MissingExtraError",
    "ModelError",
    "NotABundleError",
    "ParityError",
    "RecipeError",
    "ResourceError",
    "RuntimeInputError",
    "TmcError",
]


class TmcError(Exception):
    """The root of every error a user may see; `exit_code` is what the command line ends with."""

    exit_code = 2


class RecipeError(TmcError):
    """A recipe or device file that says something it may not; names file, line, column, value and the nearest name."""

    exit_code = 2


class ModelError(TmcError):
    """A checkpoint that is missing, damaged or of a kind no family serves."""

    exit_code = 2


class RuntimeInputError(TmcError):
    """A picture, prompt or option given to a bundle that it cannot take."""

    exit_code = 2


class MissingExtraError(TmcError):
    """An optional package is not installed; the message names the extra that brings it."""

    exit_code = 2


class LegalityError(TmcError):
    """A plan that cannot work on this model or device."""

    exit_code = 3


class ParityError(TmcError):
    """Two results that must be equal are not; names the first bad subgraph."""

    exit_code = 4


class BundleError(TmcError):
    """A bundle whose files are missing, changed or of another version."""

    exit_code = 4


class NotABundleError(BundleError):
    """A folder that is given as a bundle, or to write one to, and is something else; nothing is wrong with any bundle."""

    exit_code = 2


class ResourceError(TmcError):
    """Not enough memory, disk or another resource."""

    exit_code = 5


class ExportError(TmcError):
    """A graph that could not be lowered; always a fault of tmc-export or of an unsupported model, never of the recipe's form."""

    exit_code = 3
