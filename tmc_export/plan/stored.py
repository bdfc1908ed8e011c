"""A checkpoint whose decoder is quantized already: what a plan says of it, read from config.json alone, and which devices take it.

Its codes, scales and zero points go into the graphs as they are. A group that is no block of 32, 64 or 128 input channels becomes several,
each with the group's scale: the same numbers. That the files hold what config.json says is checked when they are opened.
"""

from __future__ import annotations

from tmc_export.core.errors import LegalityError, ModelError
from tmc_export.core.facts import DecoderFacts
from tmc_export.core.stored_codes import read_stored_scheme
from tmc_export.families._contract import ModelFiles
from tmc_export.plan._weights import decoder_linears
from tmc_export.plan.quantization import refuse_capability, refuse_precision
from tmc_export.plan.types import Plan, QuantizePlan, StoredCodes
from tmc_export.recipe import Device, Recipe
from tmc_export.recipe._schemes import BLOCKS_OF

__all__ = ["check_stored", "stored_decoder", "stored_notes"]

_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")
"""What stands before `layers.` in old and new layouts: names and patterns of config.json are of one of them."""


def stored_decoder(files: ModelFiles, decoder: DecoderFacts) -> QuantizePlan | None:
    """Return how a checkpoint stores its decoder's linears; None where they are not quantized. `keep` names those that are left out.

    Raises:
        ModelError: a method, format or option that is not read, or groups that do not divide a linear.
    """
    scheme = read_stored_scheme(files.config)
    if scheme is None:
        return None
    if not scheme.words and scheme.covers(["lm_head", *(f"{prefix}lm_head" for prefix in _PREFIXES)]):
        raise ModelError(
            "config.json: quantization_config covers lm_head, which is not read; read are the linears of the decoder's layers: name a "
            "checkpoint with lm_head under ignore"
        )
    widths = decoder_linears(decoder)
    names = [f"layers.{layer}.{linear}" for layer in range(decoder.layers) for linear in widths]
    left = tuple(name for name in names if not scheme.covers([prefix + name for prefix in _PREFIXES]))
    channels = {widths[name.split(".", 2)[2]][0] for name in names if name not in left}
    if not channels:
        raise ModelError(
            "config.json: quantization_config covers no linear of the decoder's layers, which alone are read; name such a checkpoint, or "
            "the unquantized model"
        )
    blocks = scheme.weights == "int4" or bool(scheme.group)
    sizes = {scheme.group} if scheme.group else channels
    fitting = [b for b in sorted(BLOCKS_OF["int4"], reverse=True) if all(size % b == 0 for size in sizes)]
    if (scheme.group and any(n % scheme.group for n in channels)) or (blocks and not fitting):
        what = f"groups of {scheme.group}" if scheme.group else "one group"
        raise ModelError(
            f"config.json: quantization_config stores linears of {', '.join(map(str, sorted(channels)))} input channels in {what}, and "
            "read are groups that divide them and are multiples of 32; name a checkpoint with group_size 32, 64 or 128"
        )
    stored = StoredCodes(scheme.method, scheme.group, not scheme.symmetric, scheme.scattered, scheme.inputs, scheme.kv)
    return QuantizePlan(scheme.weights, fitting[0] if blocks else 0, left, stored=stored)


def check_stored(recipe: Recipe, plan: Plan, device: Device) -> None:
    """Refuse codes that the device, its capabilities or the runtime cannot read.

    Raises:
        LegalityError: at the model's line.
    """
    runtime, place = recipe.target.runtime, recipe.origin(("model", "source"))
    capabilities = recipe.target.compute_capabilities or ((device.compute_capability,) if device.compute_capability else ())
    for part, scheme in plan.quantize.items():
        if scheme.stored is None:
            continue
        says = f"{place}: model.source: its {part} is quantized, {_says(scheme)}"
        refuse_precision(says, scheme.weights, device, runtime)
        if runtime == "tensorrt-rtx":
            refuse_capability(says, scheme.weights, capabilities, "name the unquantized model")
        if scheme.stored.zero_points and runtime != "onnxruntime":
            block = f", block: {scheme.block}" if scheme.weights == "int4" else ""
            raise LegalityError(
                f"{says}: TensorRT takes no zero points; name a symmetric checkpoint, or the unquantized model with quantize: {{{part}: "
                f"{{weights: {scheme.weights}{block}}}}}, or write target.runtime: onnxruntime"
            )


def _says(scheme: QuantizePlan) -> str:
    stored = scheme.stored
    if stored is None:
        return scheme.weights
    scales = f"groups of {stored.group}" if stored.group else "a scale per output channel"
    order = ", activation order" if stored.scattered else ""
    return f"{scheme.weights} ({stored.method}, {scales}{order}{', zero points' if stored.zero_points else ''})"


def stored_notes(plan: Plan) -> list[str]:
    """What a user should know of codes that the checkpoint brings."""
    found = []
    for part, scheme in plan.quantize.items():
        stored = scheme.stored
        if stored is None:
            continue
        left = f"; {len(scheme.keep)} linears are not quantized" if scheme.keep else ""
        found.append(f"{part}: the checkpoint's own codes are taken as they are: {_says(scheme)}{left}")
        if scheme.block and scheme.block != stored.group:
            found.append(f"{part}: its groups are stored as blocks of {scheme.block}, each with its group's scale: the same numbers")
        if plan.runtime != "onnxruntime" and scheme.weights == "int8" and scheme.block:
            found.append(f"TensorRT-RTX widens int8 in groups before each product: they are small, and read no faster than {plan.dtype}")
        if stored.scattered:
            found.append(f"{part}: groups are scattered over the input channels: products read their input in the groups' order")
        for what, code in (("inputs of products", stored.inputs), ("keys and values", stored.kv)):
            if code:
                found.append(f"{part}: the checkpoint was made for {what} in {code}; here they stay in {plan.dtype}")
    return found
