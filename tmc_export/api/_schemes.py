"""Which graph holds which part of a model, and the part's weight scheme applied to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from torch import nn

from tmc_export.core.errors import ExportError, LegalityError, ModelError, RecipeError
from tmc_export.export.checkpoint import Checkpoint
from tmc_export.families._contract import DecoderParts
from tmc_export.plan.types import Plan, QuantizePlan
from tmc_export.quantize import SCHEMES, int4
from tmc_export.quantize._divide import divide_inputs
from tmc_export.quantize._inputs import Product, quantize_inputs
from tmc_export.quantize._weights import check_keep, is_kept, weight_name, weights_of
from tmc_export.quantize.calibrated import Calibrated
from tmc_export.quantize.stored import apply_stored

__all__ = ["GraphKind", "PartSchemes", "Read", "part_of", "reads_of"]

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


def part_of(name: str, layers: Collection[str]) -> str:
    """Return the part whose scheme a linear of the model has, by its weight's name in the checkpoint.

    Args:
        name: of the weight.
        layers: names of the weights in the decoder's layers.
    """
    if name in layers:
        return "decoder"
    return "projector" if _is_projector(name) else "encoder"


@dataclass(frozen=True)
class Read:
    """A node that reads a weight of a part.

    Attributes:
        part: whose scheme the weight has.
        operator: the node's.
        name: the weight's, in the checkpoint.
        source: what the weight meets there; reads of one graph with the same number meet one tensor.
    """

    part: str
    operator: str
    name: str
    source: int


def reads_of(model: ir.Model, graph: GraphKind) -> list[Read]:
    """List what reads the weights that a scheme may store, in a graph without schemes."""
    found = []
    for part, belongs in _PARTS[graph].items():
        for node, value in weights_of(model, {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}, belongs):
            found.append(Read(part, node.op_type, weight_name(value), id(node.inputs[0])))
    return found


class PartSchemes:
    """The weight schemes of a plan.

    Args:
        plan: dtype and scheme per part.
        model: the whole model.
        checkpoint: its weights, for their names.
        parts: its decoder.
        found: what calibration found of its linears.

    Raises:
        LegalityError: a combination that is not built, or a `keep` that names nothing.
        ModelError: the checkpoint stores other linears as codes than its config.json says.
    """

    def __init__(self, plan: Plan, model: nn.Module, checkpoint: Checkpoint, parts: DecoderParts, found: Calibrated) -> None:
        _check(plan)
        self._found, self._cpu = found, plan.runtime == "onnxruntime"
        self._plan: Mapping[str, QuantizePlan] = plan.quantize
        state = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        local = {state[id(p)]: f"layers.{name}" for name, p in parts.layers.named_parameters()}
        layers = set(local)
        _check_stored(plan, checkpoint, local)
        self._packed = {matrix.name: matrix for matrix in checkpoint.packed.values()}
        matrices = [name for name, shape in checkpoint.shapes.items() if len(shape) >= 2]
        self._kernels = {checkpoint.identity(name) for name, shape in checkpoint.shapes.items() if len(shape) > 2}
        for part, scheme in self._plan.items():
            names = [checkpoint.identity(n) for n in matrices if (n in layers) == (part == "decoder")]
            check_keep(part, scheme.keep, names)
        self._changed: dict[str, int] = dict.fromkeys(self._plan, 0)

    def apply(self, model: ir.Model, graph: GraphKind, *, engine: bool = False) -> None:
        """Apply to a graph, in place, the schemes of the parts it holds; weights stay lazy.

        Args:
            model: the graph.
            graph: what it holds.
            engine: it is for the engine builder, whatever the recipe's runtime.

        Raises:
            LegalityError: a scheme cannot store one of the weights; names the part.
            RecipeError: the data did not reach a linear whose input has codes.
        """
        for part, belongs in _PARTS[graph].items():
            if part not in self._plan:
                continue
            scheme = self._plan[part]
            products = [p for p in _products(model, scheme, belongs) if p.name not in self._kernels]  # a patch embedding's input stays
            divide_inputs(model, products, self._found.divisors)
            try:
                if scheme.stored is not None:
                    applied = apply_stored(model, scheme.block, self._packed, belongs)
                elif scheme.algorithm != "rtn":
                    _check_chosen(products, self._found, scheme.algorithm)
                    applied = int4.apply(model, scheme, belongs, self._found.codes)
                else:
                    applied = SCHEMES.get(scheme.weights)(model, scheme, belongs)
            except LegalityError as error:
                raise LegalityError(f"quantize.{part}: {error}") from error
            if scheme.activations is not None:
                quantize_inputs(model, products, self._found.clips, scheme.activations, cpu=self._cpu and not engine)
            self._changed[part] += len(applied.changed) + len(applied.kept)

    def counts(self) -> dict[str, int]:
        """Return how many weights of each part a scheme has dealt with so far."""
        return dict(self._changed)

    def restore(self, counts: Mapping[str, int]) -> None:
        """Take over what `counts` said in an earlier build of the same plan."""
        self._changed.update(counts)

    def finish(self) -> None:
        """Check, when every graph is made, that no scheme went without effect.

        Raises:
            ExportError: a part that the recipe quantizes had no weight.
        """
        for part, count in self._changed.items():
            if not count and part != "kv":
                raise ExportError(f"quantize.{part}: no weight of that part was found in any subgraph; remove it from the recipe")


def _check_chosen(products: Sequence[Product], found: Calibrated, algorithm: str) -> None:
    missing = [product.name for product in products if product.name not in found.codes]
    if missing:
        raise RecipeError(
            f"quantize.calibration: no sample reached '{missing[0]}' ({len(missing)} such linears here), so that {algorithm} cannot choose "
            "its codes; give samples that use it (with pictures, or longer), or name it in keep"
        )


def _products(model: ir.Model, scheme: QuantizePlan, belongs: Callable[[str], bool]) -> list[Product]:
    """The matrix products of a part, without those that the plan keeps."""
    found = [Product(node, weight_name(value)) for node, value in weights_of(model, {"MatMul": 1}, belongs)]
    return [product for product in found if not is_kept(product.name, scheme.keep)]


def _check_stored(plan: Plan, checkpoint: Checkpoint, local: Mapping[str, str]) -> None:
    """Compare the linears that are stored as codes with those that the plan read out of config.json.

    Args:
        plan: of the checkpoint.
        checkpoint: opened.
        local: state-dict name of a decoder layer's parameter → `layers.<l>.<name>`.
    """
    outside = sorted(name for name in checkpoint.packed if name not in local)
    if outside:
        raise ModelError(
            f"{checkpoint.folder} stores '{outside[0]}' as codes ({len(outside)} such matrices), and read are those of the decoder's "
            "layers; name a checkpoint that leaves the vision tower, the projector and the head as they are"
        )
    scheme = plan.quantize.get("decoder")
    if scheme is None or scheme.stored is None:
        return
    linears = {name: place.removesuffix(".weight") for name, place in local.items() if len(checkpoint.shapes[name]) == 2}
    wrong = sorted(p for name, p in linears.items() if (name in checkpoint.packed) == (p in scheme.keep))
    if wrong:
        raise ModelError(
            f"{checkpoint.folder}: '{wrong[0]}' is stored in another way than config.json says ({len(wrong)} such linears): config.json "
            "and weights do not belong together; fetch the model again"
        )


def _check(plan: Plan) -> None:
    if plan.dtype == "bfloat16":
        raise LegalityError(
            "model.dtype: bfloat16 bundles are not built yet (onnxruntime's CPU path has no bfloat16 kernels); use float16 or float32"
        )
    kv = plan.quantize.get("kv")
    if kv is not None and kv.weights == "fp16" and plan.dtype != "float16":
        raise LegalityError(
            f"quantize.kv: fp16 slots beside {plan.dtype} arithmetic are not built yet; remove quantize.kv, "
            "or use model.dtype: float16, whose slots are fp16"
        )
