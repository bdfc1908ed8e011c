"""Which graph holds which part of a model, and the part's weight scheme applied to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import onnx_ir as ir
from torch import nn

from tmc_export.core.errors import ExportError, LegalityError
from tmc_export.export.checkpoint import Checkpoint
from tmc_export.families._contract import DecoderParts
from tmc_export.plan.types import Plan, QuantizePlan
from tmc_export.quantize import SCHEMES
from tmc_export.quantize._weights import check_keep

__all__ = ["GraphKind", "PartSchemes"]

GraphKind = Literal["vision", "embed", "block", "compress", "tower"]

_PROJECTORS = frozenset({"projector", "multi_modal_projector", "merger", "connector"})


def _is_projector(name: str) -> bool:
    return not _PROJECTORS.isdisjoint(name.split(".")) and not _is_learned(name)


def _is_learned(name: str) -> bool:
    """Weights of a method keep the plan's dtype: no scheme of the model's parts is theirs."""
    return name.startswith("learned.")


_PARTS: Mapping[GraphKind, Mapping[str, Callable[[str], bool]]] = {
    "vision": {"encoder": lambda n: not _is_projector(n) and not _is_learned(n), "projector": _is_projector},
    "embed": {"head": lambda _: True},
    "block": {"decoder": lambda n: n.startswith("layers."), "head": lambda n: n.startswith("head.")},
    "compress": {},
    "tower": {},
}
"""Graph → part → which initializers are the part's. Nothing of a compress graph or a text tower is anybody's: scores are never quantized.

The token table goes with the head, whose tensor it often is.
"""


class PartSchemes:
    """The weight schemes of a plan.

    Args:
        plan: dtype and scheme per part.
        model: the whole model.
        checkpoint: its weights, for their names.
        parts: its decoder.

    Raises:
        LegalityError: a combination that is not built, or a `keep` that names nothing.
    """

    def __init__(self, plan: Plan, model: nn.Module, checkpoint: Checkpoint, parts: DecoderParts) -> None:
        _check(plan)
        self._plan: Mapping[str, QuantizePlan] = plan.quantize
        state = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        layers = {state[id(p)] for p in parts.layers.parameters()}
        matrices = [name for name, shape in checkpoint.shapes.items() if len(shape) == 2]
        for part, scheme in self._plan.items():
            names = [checkpoint.identity(n) for n in matrices if (n in layers) == (part == "decoder")]
            check_keep(part, scheme.keep, names)
        self._changed: dict[str, int] = dict.fromkeys(self._plan, 0)

    def apply(self, model: ir.Model, graph: GraphKind) -> None:
        """Apply to a graph, in place, the schemes of the parts it holds; weights stay lazy.

        Raises:
            LegalityError: a scheme cannot store one of the weights; names the part.
        """
        for part, belongs in _PARTS[graph].items():
            if part in self._plan:
                try:
                    applied = SCHEMES.get(self._plan[part].weights)(model, self._plan[part], belongs)
                except LegalityError as error:
                    raise LegalityError(f"quantize.{part}: {error}") from error
                self._changed[part] += len(applied.changed) + len(applied.kept)

    def finish(self) -> None:
        """Check, when every graph is made, that no scheme went without effect.

        Raises:
            ExportError: a part that the recipe quantizes had no weight.
        """
        for part, count in self._changed.items():
            if not count and part != "kv":
                raise ExportError(f"quantize.{part}: no weight of that part was found in any subgraph; remove it from the recipe")


def _check(plan: Plan) -> None:
    if plan.dtype == "bfloat16":
        raise LegalityError(
            "model.dtype: bfloat16 bundles are not built yet (onnxruntime's CPU path has no bfloat16 kernels); use float16 or float32"
        )
    if "kv" in plan.quantize and plan.dtype != "float16":
        raise LegalityError(
            f"quantize.kv: fp16 slots beside {plan.dtype} arithmetic are not built yet; remove quantize.kv, "
            "or use model.dtype: float16, whose slots are fp16"
        )
