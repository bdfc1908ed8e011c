"""Model families: one file each. `FAMILIES` finds every public module of this folder by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from tmc_export.core.errors import ModelError
from tmc_export.core.registry import Registry
from tmc_export.families._contract import Family
from tmc_export.families._form import check_form

__all__ = ["FAMILIES", "family_of", "register_family"]


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"tmc_export.families.{module.name}")


FAMILIES: Registry[type[Family]] = Registry("family", _load)


def register_family(name: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family class under `name`; a second one of that name raises `ValueError`."""

    def add(family: type[Family]) -> type[Family]:
        family.name = name
        return FAMILIES.register(name)(family)

    return add


def family_of(config: dict[str, object]) -> type[Family]:
    """Return the family that serves a `config.json`.

    Raises:
        ModelError: no family names its architecture or model type, or a number in it is none.
    """
    names = config.get("architectures") or []
    wanted = {str(n) for n in names} if isinstance(names, list) else set()
    for name in FAMILIES:
        family = FAMILIES.get(name)
        if wanted & set(family.architectures) or (not wanted and config.get("model_type") in family.model_types):
            check_form(config, name)
            return family
    served = sorted(a for name in FAMILIES for a in FAMILIES.get(name).architectures)
    raise ModelError(
        f"no family serves the architecture {sorted(wanted) or config.get('model_type')!r}; served are: {', '.join(served)}; "
        "a new family is one file in tmc_export/families"
    )
