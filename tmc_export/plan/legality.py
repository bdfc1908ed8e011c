"""What cannot work is refused here, with the recipe's line, the reason and the fix.

Budgets, sites and model limits are refused where they are resolved (`entries.py`, `resolve.py`), schemes in `quantization.py`, memory in
`memory.py`; what a user should know of a legal plan is in `notes.py`. A TopK above TensorRT's 3840 needs no check: `graphs/_ops.py` ranks
by comparison there. Entries at the same site act in the recipe's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tmc_export.core.errors import LegalityError
from tmc_export.core.facts import EncoderFacts
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Attention, Features, Keys, Need, TextEmbeds, TextTower
from tmc_export.plan._weights import LINEARS
from tmc_export.plan.quantization import check_calibration, check_capability, check_precisions, check_slots
from tmc_export.plan.states import leaving_vision
from tmc_export.plan.tied import check_seen, check_unseen
from tmc_export.plan.types import CutPlan, Plan, QuantizePlan, StagePlan
from tmc_export.recipe import Device, Recipe

__all__ = ["RTX_CAPABILITIES", "check_plan", "check_target"]

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX 1.7 builds for."""


# -------------------------------------------------------------------------------------------------- recipe and device
def check_target(recipe: Recipe, device: Device) -> None:
    """Refuse what the device cannot do, before the model is looked at.

    Raises:
        LegalityError: with line, reason and fix.
    """
    _check_runtime(recipe, device)
    _check_capabilities(recipe, device)
    check_precisions(recipe, device)
    _check_dtype(recipe)
    check_slots(recipe)
    check_calibration(recipe)
    if recipe.inputs.batch > 1:
        raise LegalityError(
            f"{recipe.origin(('inputs', 'batch'))}: inputs.batch: {recipe.inputs.batch} is not built yet: the runtime runs one "
            "conversation at a time; remove it, or write batch: 1"
        )
    if recipe.model.revision is not None and recipe.model_folder() is not None:
        raise LegalityError(
            f"{recipe.origin(('model', 'revision'))}: model.revision: {recipe.model.revision} has no effect on a folder, which holds one "
            "revision; remove it, or name a hub id in model.source"
        )
    if recipe.inputs.images == 0:
        for key in ("image_size", "fit"):
            if getattr(recipe.inputs, key) is not None:
                raise LegalityError(f"{recipe.origin(('inputs', key))}: inputs.{key} has nothing to act on: inputs.images is 0; remove it")
        for part in ("encoder", "projector"):
            if getattr(recipe.quantize, part) is not None:
                raise LegalityError(
                    f"{recipe.origin(('quantize', part))}: quantize.{part} has nothing to act on: inputs.images is 0; remove it"
                )
        if recipe.compress:
            raise LegalityError(
                f"{recipe.origin(('compress', 0, 'at'))}: {recipe.compress[0].at} compresses pictures, but inputs.images is 0; remove "
                "the entry"
            )


def _check_runtime(recipe: Recipe, device: Device) -> None:
    runtime, flavour, place = recipe.target.runtime, device.tensorrt.flavour, recipe.origin(("target", "runtime"))
    if runtime in ("onnxruntime", flavour):
        return
    if flavour == "none":
        raise LegalityError(f"{place}: runtime: {runtime} needs an NVIDIA GPU, and '{device.name}' has none; write runtime: onnxruntime")
    if runtime == "tensorrt-rtx":
        raise LegalityError(
            f"{place}: runtime: tensorrt-rtx builds for desktop GPUs (compute capabilities {', '.join(RTX_CAPABILITIES)}) and cannot "
            f"target '{device.name}' ({device.compute_capability}); write runtime: tensorrt, which builds on the device"
        )
    raise LegalityError(
        f"{place}: runtime: tensorrt is not known for '{device.name}', whose device file names {flavour} {device.tensorrt.version}; "
        f"write runtime: {flavour}, or give the release in a device file of your own: tensorrt: {{flavour: tensorrt, version: …}}"
    )


def _check_capabilities(recipe: Recipe, device: Device) -> None:
    named = recipe.target.compute_capabilities
    place = recipe.origin(("target", "compute_capabilities"))
    if named is not None:
        if recipe.target.runtime != "tensorrt-rtx":
            raise LegalityError(
                f"{place}: compute_capabilities has no effect with runtime: {recipe.target.runtime}; only tensorrt-rtx builds for named "
                "GPUs; remove it"
            )
        if not named:
            raise LegalityError(
                f"{place}: compute_capabilities is empty: the engine would claim every GPU; remove it, or name "
                f"'{device.compute_capability}'"
            )
        for each in named:
            if each not in RTX_CAPABILITIES:
                raise LegalityError(
                    f"{place}: TensorRT-RTX cannot build for compute capability '{each}'; it builds for {', '.join(RTX_CAPABILITIES)}"
                )
        if device.compute_capability not in named:
            raise LegalityError(
                f"{place}: engines for {', '.join(named)} do not run on '{device.name}', which is {device.compute_capability}; add it to "
                "the list"
            )
    if recipe.target.runtime == "tensorrt-rtx" and named is None and device.compute_capability not in RTX_CAPABILITIES:
        raise LegalityError(
            f"{recipe.origin(('target', 'device'))}: TensorRT-RTX cannot build for '{device.name}' ({device.compute_capability}); "
            f"it builds for {', '.join(RTX_CAPABILITIES)}"
        )
    built_for = named or ((device.compute_capability,) if device.compute_capability else ())
    if recipe.target.runtime == "tensorrt-rtx":
        check_capability(recipe, built_for)


def _check_dtype(recipe: Recipe) -> None:
    if recipe.model.dtype == "bfloat16":
        raise LegalityError(
            f"{recipe.origin(('model', 'dtype'))}: graphs in bfloat16 are not built yet; write dtype: float16, into which the export "
            "converts a bfloat16 "
            "checkpoint and refuses values that overflow"
        )


# ------------------------------------------------------------------------------------------------------ plan and model
def check_plan(recipe: Recipe, plan: Plan) -> None:
    """Refuse what the subgraphs and the runtime cannot do with the resolved stages.

    Raises:
        LegalityError: with line, reason and fix.
    """
    for vision in plan.vision:
        for stage in vision.stages:
            _check_vision_needs(recipe, stage, vision.facts.encoder)
        if vision.barrier:
            _check_barrier(recipe, plan, vision.stages[-1])
    for cut in plan.cuts:
        for stage in cut.stages:
            _check_cut_needs(recipe, cut, stage)
            _check_sequence(recipe, plan, stage)
            _check_kv(recipe, plan, cut, stage)
    _check_states(recipe, plan)
    check_seen(recipe, plan)
    check_unseen(recipe, plan)
    _check_keep(recipe, plan)
    replacing = next((v.replacing for v in plan.vision if v.replacing is not None), None)
    if replacing is not None and "projector" in plan.quantize:
        raise LegalityError(
            f"{recipe.origin(('quantize', 'projector'))}: quantize.projector has nothing to act on: '{replacing.method}' replaces the "
            "projector, and learned weights of a method keep model.dtype; remove it"
        )


def _check_sequence(recipe: Recipe, plan: Plan, stage: StagePlan) -> None:
    """What a cut may do to positions, to the prompt's text, and to the last visual token."""
    place, name, method = _at(recipe, stage), f"method '{stage.method}' at {stage.stage.at}", METHODS.get(stage.method)
    if stage.after.positions == "truncate" and plan.rope_axes > 1:
        raise LegalityError(
            f"{place}: {name} truncates positions, and this model's have {plan.rope_axes} axes: the first ones that arrived are rows and "
            "columns of the picture, no places in the text; choose a method that keeps or renumbers them"
        )
    if not stage.after.tokens and stage.after.kv_rows:
        raise LegalityError(
            f"{place}: {name} leaves 0 tokens and still names KV rows of {_runs(sorted(stage.after.kv_rows))}; keep a token, or no KV rows"
        )
    if not method.replaces_text:
        return
    if stage.stage.at.layer:
        raise LegalityError(f"{place}: {name} replaces the prompt's embeddings, which only stand at decoder.0; use decoder.0")
    if not any(isinstance(need, TextEmbeds) for need in stage.stage.needs):
        raise LegalityError(f"{place}: {name} replaces 1 text and does not ask for it; add TextEmbeds to its needs")
    if stage.scope != "joint" and plan.images > 1:
        raise LegalityError(
            f"{place}: {name} replaces the prompt's text by what one picture makes of it, and inputs.images is {plan.images}; write scope: "
            "joint, or images: 1"
        )


def _check_barrier(recipe: Recipe, plan: Plan, stage: StagePlan) -> None:
    """Tokens that hide what stands before them: one picture, and no cut that would score over what is hidden."""
    place, name = _at(recipe, stage), f"method '{stage.method}' at {stage.stage.at}"
    if plan.images > 1:
        raise LegalityError(
            f"{place}: {name} hides everything before a picture's last {stage.after.barrier} tokens, the pictures before it, too, and "
            f"inputs.images is {plan.images}; write images: 1"
        )
    if plan.cuts:
        raise LegalityError(
            f"{place}: {name} hides the picture from the text, and '{plan.cuts[0].stages[0].method}' cuts at decoder.{plan.cuts[0].layer}, "
            "where text would score hidden tokens: not built; choose one of the two"
        )


def _at(recipe: Recipe, stage: StagePlan) -> str:
    return str(recipe.origin(("compress", stage.entry, "at")))


def _refuse(recipe: Recipe, stage: StagePlan, need: Need, has: str) -> LegalityError:
    return LegalityError(
        f"{_at(recipe, stage)}: method '{stage.method}' asks for {need} at {stage.stage.at}, which has {has}; use it at another site"
    )


def _check_look_ahead(recipe: Recipe, stage: StagePlan, need: Need, encoder: EncoderFacts) -> None:
    """The layer to come exists before a layer, and behind the last one in use where the checkpoint has more."""
    site = stage.stage.at
    if encoder.merge > 1:
        raise _refuse(recipe, stage, need, "an encoder whose tokens are not cut between layers")
    if site.point is not None or site.part != "encoder":
        raise _refuse(recipe, stage, need, "no whole layer to come; sites with one are encoder.<l> and encoder")
    if site.layer is None and not encoder.spare:
        raise _refuse(
            recipe, stage, need, f"no layer to come: all {encoder.layers} layers of this checkpoint are in use; ask for the layer before"
        )


def _check_vision_needs(recipe: Recipe, stage: StagePlan, encoder: EncoderFacts) -> None:
    site, classes, merge = stage.stage.at, encoder.class_tokens, encoder.merge
    for need in stage.stage.needs:
        if site.part == "input":
            raise _refuse(recipe, stage, need, "pixels only: nothing was computed yet")
        if isinstance(need, TextTower):
            continue
        if site.point == "replace" and merge > 1:
            raise _refuse(recipe, stage, need, "the patches alone, put into raster order")
        if site.part == "projector" and site.point is None and (classes or merge > 1):
            raise _refuse(recipe, stage, need, "other tokens than the encoder's last layer (class tokens dropped, or patches joined)")
        if isinstance(need, TextEmbeds):
            raise _refuse(recipe, stage, need, "no prompt: a picture is encoded by itself")
        if isinstance(need, Attention):
            if need.rows not in ("cls", "all"):
                raise _refuse(recipe, stage, need, "class-token rows and column sums")
            if site.point == "replace" and classes and (need.logits or need.heads == "joined"):
                raise _refuse(recipe, stage, need, "weights after softmax, of single heads, with the class token's column dropped")
            if need.rows == "cls" and not (stage.before.class_tokens if site.part == "encoder" else classes):
                raise _refuse(recipe, stage, need, "no class token, or lost it to an earlier entry" if classes else "no class token")
        if isinstance(need, (Attention, Keys)) and need.layer == "next":
            _check_look_ahead(recipe, stage, need, encoder)
            continue
        if site.layer == 0 and site.point is None:
            raise _refuse(recipe, stage, need, "no layer before it; the first site with one is encoder.0.mid or encoder.1")
        if isinstance(need, Features) and need.layer >= 0 and site.layer is not None and need.layer >= site.layer:
            raise _refuse(recipe, stage, need, f"features of layers below {site.layer}")


def _check_cut_needs(recipe: Recipe, cut: CutPlan, stage: StagePlan) -> None:
    for need in stage.stage.needs:
        if isinstance(need, TextTower) and stage.scope == "joint":
            raise _refuse(recipe, stage, need, "all pictures at once under scope: joint, and a question belongs to its pictures")
        if isinstance(need, (Keys, Features)):
            raise _refuse(recipe, stage, need, "attention rows and the text tokens' states; encoder sites have keys and features")
        if not isinstance(need, Attention):
            continue
        if need.rows == "cls":
            raise _refuse(recipe, stage, need, "no class token: attention rows are those of last, text, visual, window and all")
        if need.heads == "joined":
            raise _refuse(recipe, stage, need, "a rotary embedding per head: heads are mean, max, sum or none")
        if need.rows == "visual" and not need.row_sum:
            raise _refuse(recipe, stage, need, "the visual rows as a sum only (row_sum=True)")
        if need.rows == "window" and not 1 <= need.window <= cut.tokens_in:
            raise _refuse(recipe, stage, need, f"{cut.tokens_in} tokens in its bucket, so that a window is 1 to {cut.tokens_in}")


def _check_states(recipe: Recipe, plan: Plan) -> None:
    """What a stage hands from the encoder to the decoder has one static shape."""
    for entry in leaving_vision(plan) if len(plan.vision) > 1 else ():
        stage = next(s for v in plan.vision for s in v.stages if s.entry == entry)
        raise LegalityError(
            f"{_at(recipe, stage)}: method '{stage.method}' has stages in the encoder and in the decoder, and inputs.image_size names "
            f"{len(plan.vision)} buckets: what it hands on would have as many shapes; write one [height, width]"
        )


def _check_kv(recipe: Recipe, plan: Plan, cut: CutPlan, stage: StagePlan) -> None:
    """Earlier layers whose KV a stage prunes: whole blocks, one count each, and none before another cut."""
    rows: Mapping[int, int] = stage.after.kv_rows
    if not rows:
        return
    place, name = _at(recipe, stage), f"method '{stage.method}' at {stage.stage.at}"
    later = sorted(layer for layer in rows if layer >= cut.layer)
    if later:
        raise LegalityError(
            f"{place}: {name} prunes the KV of {_runs(later)}, which have not run there; it may name layers below {cut.layer}"
        )
    for block in plan.blocks[: cut.before_block]:
        inside = [layer for layer in range(block.first, block.last) if layer in rows]
        if inside and (len(inside) < block.last - block.first or len({rows[layer] for layer in inside}) > 1):
            raise LegalityError(
                f"{place}: {name} prunes the KV of {_runs(inside)} of the block of layers {_runs(range(block.first, block.last))}, whose "
                "layers share one slot table; it must leave equally many rows in all of them"
            )
    between = [c for c in plan.cuts if min(rows) < c.layer < cut.layer and c.tokens_in != c.tokens_out]
    if between:
        raise LegalityError(
            f"{place}: {name} prunes the KV of {_runs(sorted(rows))}, and '{between[-1].stages[-1].method}' at decoder.{between[-1].layer} "
            "cut between them: rows of the first layers are other tokens; put it before that cut, or choose one of the two"
        )


def _runs(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def _check_keep(recipe: Recipe, plan: Plan) -> None:
    """A name under `keep` that matches no linear would be a silent no-op."""
    scheme: QuantizePlan | None = plan.quantize.get("decoder")
    names = [f"layers.{layer}.{linear}" for layer in range(plan.facts.decoder.layers) for linear in LINEARS]
    for index, wanted in enumerate(scheme.keep if scheme is not None else ()):
        if not any(f".{wanted}." in f".{name}." for name in names):
            raise LegalityError(
                f"{recipe.origin(('quantize', 'decoder', 'keep', index))}: keep: '{wanted}' matches no linear of the decoder; "
                f"they are layers.<0 to {plan.facts.decoder.layers - 1}>.{{{', '.join(LINEARS)}}}"
            )
