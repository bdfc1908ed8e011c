"""The promise of each subgraph under `onnx/`: every shape a number, every operator standard and one TensorRT takes, or allowed by name."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes

from tmc_export.core.errors import ExportError

__all__ = ["OWN_OPERATORS", "REFUSED_OPERATORS", "AssertStaticPass"]

REFUSED_OPERATORS = frozenset(
    {"NonZero", "Unique", "Compress", "NonMaxSuppression", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "Range"}
)
"""Operators with data-dependent shapes, or that TensorRT-RTX 1.7 refuses to parse.

`Range` is folded to a constant when its ends are static.
"""

OWN_OPERATORS = frozenset({"trt::TRT_FP4DynamicQuantize"})
"""Operators of TensorRT that no standard one stands for; nvfp4 activations put it in."""

TOP_K_LIMIT = 3840
"""Largest k that TensorRT-RTX 1.7 builds."""


class AssertStaticPass(ir.passes.InPlacePass):
    """Check; nothing is changed.

    Args:
        name: of the subgraph, for the message.
        allowed: `domain::operator` that may be there besides standard ONNX and `OWN_OPERATORS`.
    """

    def __init__(self, name: str, allowed: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.name, self.allowed = name, allowed | OWN_OPERATORS

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return the model unchanged.

        Raises:
            ExportError: a shape is not a number, or an operator is not allowed.
        """
        for value in [*model.graph.inputs, *model.graph.outputs]:
            self._check(value, "graph input or output")
        for node in model.graph.all_nodes():
            if node.domain not in ("", "ai.onnx") and f"{node.domain}::{node.op_type}" not in self.allowed:
                raise ExportError(f"{self.name}: operator {node.domain}::{node.op_type} is not standard ONNX (node '{node.name}')")
            if node.op_type in REFUSED_OPERATORS or (
                node.op_type.startswith("Scatter") and node.attributes.get_string("reduction", "none") != "none"
            ):
                raise ExportError(
                    f"{self.name}: operator {node.op_type} (node '{node.name}') has no static form in TensorRT; write the method without it"
                )
            for value in (v for v in node.outputs if v.name != ""):  # an optional output left out has no name
                self._check(value, f"output of {node.op_type}")
        return ir.passes.PassResult(model, False)

    def _check(self, value: ir.Value, what: str) -> None:
        if value.shape is None or not value.shape.is_static():
            raise ExportError(f"{self.name}: {what} '{value.name}' has the shape {value.shape}, not numbers; every shape must be static")
