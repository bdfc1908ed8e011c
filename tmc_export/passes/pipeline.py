"""The order of the passes, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes
import onnx_ir.passes.common as common
from onnxscript import optimizer

from tmc_export.passes.append_in_place import AppendInPlacePass
from tmc_export.passes.assert_static import AssertStaticPass
from tmc_export.passes.attend_by_key import ROTATED, AttendByKeyPass
from tmc_export.passes.divide_by_root import DivideByRootPass
from tmc_export.passes.drop_empty_inputs import DropEmptyInputsPass
from tmc_export.passes.drop_outputs import DropOutputsPass
from tmc_export.passes.fold_weight_transposes import FoldWeightTransposesPass
from tmc_export.passes.fuse_decode_attention import FUSED, FuseDecodeAttentionPass
from tmc_export.passes.fuse_skip_norms import SKIPPED, FuseSkipNormsPass
from tmc_export.passes.group_query_heads import GroupQueryHeadsPass
from tmc_export.passes.join_projections import JoinProjectionsPass
from tmc_export.passes.keep_outputs import KeepOutputsPass, output_names
from tmc_export.passes.merge_reshapes import MergeReshapesPass
from tmc_export.passes.pick_only_row import PickOnlyRowPass
from tmc_export.passes.sign_rotation import SignRotationPass
from tmc_export.passes.skip_future_keys import SkipFutureKeysPass
from tmc_export.passes.specialize_sizes import SpecializeSizesPass

__all__ = ["clean", "finish", "specialize"]

_FOLD_INPUT, _FOLD_OUTPUT = 1 << 16, 1 << 22
"""Constants up to these sizes (elements) are folded; weights are larger and stay lazy."""


def _fold(model: ir.Model, *, iterations: int, infer_shapes: bool) -> None:
    """Fold constants; what the optimizer leaves alone it would tell at length, and `AssertStaticPass` judges the result anyway."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        optimizer.optimize_ir(
            model,
            num_iterations=iterations,
            onnx_shape_inference=infer_shapes,
            input_size_limit=_FOLD_INPUT,
            output_size_limit=_FOLD_OUTPUT,
        )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def clean(model: ir.Model) -> ir.Model:
    """Passes that a traced graph gets once, still symbolic: identities, common terms, weights as MatMul reads them."""
    names = output_names(model)
    FoldWeightTransposesPass()(model)  # first: the optimizer would evaluate a weight to fold its Transpose
    _fold(model, iterations=2, infer_shapes=False)
    passes = ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        KeepOutputsPass(names),
    )
    return passes(model).model


def specialize(model: ir.Model, sizes: Mapping[str, int], name: str, *, append: bool = False, causal: bool = False) -> ir.Model:
    """Return a static copy of a symbolic graph.

    Args:
        model: cleaned; left as it is (weights are shared, not copied).
        sizes: symbol → number.
        name: of the result, for messages.
        append: the graph takes one token and writes it into the slots, of which there is one more than `sizes` says.
        causal: the graph takes a turn's tokens in the order of the conversation, padding behind them.

    Raises:
        ExportError: a shape stays open or an operator is not allowed.
    """
    static = model.clone()
    static.graph.name = name
    if append:
        ir.passes.Sequential(DropOutputsPass("sums."), common.RemoveUnusedNodesPass())(static)
    names = output_names(static)
    ir.passes.Sequential(SpecializeSizesPass(sizes), DropEmptyInputsPass())(static)
    _fold(static, iterations=3, infer_shapes=True)
    if append:
        common.ShapeInferencePass()(static)
        AppendInPlacePass()(static)
        names = output_names(static)
    ir.passes.Sequential(
        common.ShapeInferencePass(), DivideByRootPass(), SignRotationPass(), *([SkipFutureKeysPass()] if causal else []),
        GroupQueryHeadsPass(), *([PickOnlyRowPass()] if append else []), MergeReshapesPass(),
    )(static)  # fmt: skip
    finish = ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(), DropEmptyInputsPass(),
        KeepOutputsPass(names), common.ShapeInferencePass(), common.NameFixPass(),
    )  # fmt: skip
    return AssertStaticPass(name)(finish(static).model).model  # by itself: a sequence would wrap its error


def finish(model: ir.Model, *, static: bool = True, visual: int | None = None) -> None:
    """Passes that need to know how each weight is stored, in place: what reads one value is joined.

    Args:
        model: weight schemes applied.
        static: every shape is a number; the blocks of the engine builder stay symbolic.
        visual: the graph takes one token in a conversation of up to so many visual ones, no layer has a window, and onnxruntime runs it:
            use its operators for attention.

    Raises:
        ExportError: a shape stays open or an operator is not allowed.
    """
    names = output_names(model)
    step = [] if visual is None else [AttendByKeyPass(visual), MergeReshapesPass(), FuseDecodeAttentionPass(), FuseSkipNormsPass()]
    ir.passes.Sequential(
        JoinProjectionsPass(), *step, common.RemoveUnusedNodesPass(), common.TopologicalSortPass(), KeepOutputsPass(names)
    )(model)  # fmt: skip
    if static:
        AssertStaticPass(model.graph.name or "", frozenset({FUSED, ROTATED, SKIPPED}) if step else frozenset())(model)
