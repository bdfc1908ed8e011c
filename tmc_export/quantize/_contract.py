"""What a weight scheme is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tmc_export.core.registry import Registry

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["SCHEMES", "Applied", "Scheme", "WeightPlan"]


class WeightPlan(Protocol):
    """The scheme of one part, as the plan says it."""

    @property
    def weights(self) -> str:
        """The scheme's registered name."""
        ...

    @property
    def block(self) -> int:
        """Input channels that share a scale."""
        ...

    @property
    def keep(self) -> tuple[str, ...]:
        """Names, or parts of names between dots, of weights that stay in the base precision."""
        ...


@dataclass(frozen=True)
class Applied:
    """What a scheme did to one graph, by the weights' names in the checkpoint.

    Attributes:
        changed: weights now stored by the scheme.
        kept: weights that the plan keeps in the base precision.
    """

    changed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


class Scheme(Protocol):
    """A weight scheme."""

    def __call__(self, model: ir.Model, plan: WeightPlan, belongs: Callable[[str], bool]) -> Applied:
        """Rewrite a graph in place.

        Args:
            model: cleaned; weights are lazy tensors, and stay lazy.
            plan: block and keep.
            belongs: whether an initializer of that name is of the part.

        Raises:
            LegalityError: the scheme cannot store one of the weights.
        """
        ...


def _load() -> None:
    for name in ("fp16", "bf16", "int8", "int4", "fp8", "nvfp4"):
        importlib.import_module(f"tmc_export.quantize.{name}")


SCHEMES: Registry[Scheme] = Registry("weight scheme", _load)
"""Name → scheme."""
