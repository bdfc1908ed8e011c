"""The scales that calibration found for the KV slots, as graphs and runtime take them, and the slots of a graph made codes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tmc_export.bundle.program import SlotCodes
from tmc_export.core.errors import ExportError, LegalityError
from tmc_export.passes.quantize_slots import QuantizeSlotsPass
from tmc_export.plan.types import Plan

__all__ = ["quantize_slots", "slot_codes"]

_CODES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def slot_codes(plan: Plan, found: Mapping[str, tuple[float, ...]] | None) -> SlotCodes | None:
    """Return how a plan's slots are stored; None where they hold keys and values as they are.

    Args:
        plan: says whether slots are codes, and which layers and heads there are.
        found: `<layer>.key` and `<layer>.value` → a scale per KV head.

    Returns:
        The scales rounded to the plan's dtype: what the graphs hold, and the reference reckons with.

    Raises:
        LegalityError: the plan's slots are codes, and no scales were found.
        ExportError: scales are missing, or are no numbers above 0, or the plan has no use for any.
    """
    scheme = plan.quantize.get("kv")
    if scheme is None or scheme.weights not in _CODES:
        if found is not None:
            raise ExportError(f"scales of {len(found)} KV tensors were found, and the plan's slots are no codes; leave them out")
        return None
    if found is None:
        raise LegalityError(
            f"quantize.kv.weights: {scheme.weights} slots need scales that are found on the calibration data, and none were found; give "
            "samples, or remove quantize.kv"
        )
    decoder = plan.facts.decoder
    wanted = {f"{layer}.{kind}" for layer in range(decoder.layers) for kind in ("key", "value")}
    if wanted != found.keys():
        odd = sorted(wanted ^ found.keys())[0]
        raise ExportError(f"scales were found for {len(found)} KV tensors, the decoder has {len(wanted)}; first that differs: '{odd}'")
    kind = np.float16 if plan.dtype == "float16" else np.float32
    least = float(np.finfo(kind).tiny)
    rounded = {name: np.maximum(np.asarray(scales, kind), kind(least)) for name, scales in sorted(found.items())}
    for name, scales in rounded.items():
        if scales.shape != (decoder.kv_heads,) or not np.isfinite(scales).all() or not (np.asarray(found[name]) > 0).all():
            raise ExportError(f"'{name}' has the scales {found[name]}; {decoder.kv_heads} finite numbers above 0 are needed")
    scales = {name: tuple(scales.tolist()) for name, scales in rounded.items()}
    return SlotCodes(dtype="fp8" if scheme.weights == "fp8" else "int8", scales=scales)


def quantize_slots(model: ir.Model, codes: SlotCodes | None, dtype: str) -> None:
    """Make the slots that a cleaned graph reads and fills codes, in place.

    Args:
        model: symbolic, or a compress graph.
        codes: their scales; None leaves the graph as it is.
        dtype: that the graph computes in.
    """
    if codes is not None:
        QuantizeSlotsPass({name: np.array(scales, dtype) for name, scales in codes.scales.items()}, _CODES[codes.dtype])(model)
