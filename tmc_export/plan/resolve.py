"""Recipe × model → plan: every count and every shape becomes a number, or the recipe is refused with line, reason and fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from tmc_export.core.errors import LegalityError, ModelError
from tmc_export.core.facts import ModelFacts
from tmc_export.families import family_of
from tmc_export.families._contract import Family, ModelFiles
from tmc_export.graphs._contract import Attention, Layout, Positions, Segment, Stage
from tmc_export.plan.entries import Entry, read_entries
from tmc_export.plan.learned import bind
from tmc_export.plan.rows import handed_rows
from tmc_export.plan.stored import stored_decoder
from tmc_export.plan.sums import sum_in_blocks
from tmc_export.plan.tied import broken_tie
from tmc_export.plan.towers import read_towers
from tmc_export.plan.types import BlockPlan, CutPlan, Plan, QuantizePlan, StagePlan, VisionPlan
from tmc_export.recipe import PARTS
from tmc_export.recipe.recipe import Recipe

__all__ = ["resolve"]


def resolve(recipe: Recipe, files: ModelFiles, splits: Sequence[int] = ()) -> Plan:
    """Make the plan of a recipe.

    Args:
        recipe: checked against its schema.
        files: the model's JSON files.
        splits: decoder layers at which blocks are cut besides the recipe's own cuts, to bound the memory of an engine build.

    Raises:
        ModelError: the model is not served.
        RecipeError: a method or option does not exist.
        LegalityError: the recipe cannot work on this model.
    """
    family = family_of(dict(files.config))
    sizes = _sizes(recipe, family, files)
    first = _facts(recipe, family, files, sizes[0])
    entries = read_entries(recipe, first)
    vision = tuple(_vision(i, size, recipe, family, files, entries) for i, size in enumerate(sizes)) if recipe.inputs.images else ()
    towers = read_towers(recipe, entries)
    blocks, cuts = _decoder(recipe, first, entries, vision, splits)
    if any(v.barrier for v in vision):
        blocks = tuple(replace(b, since=True) for b in blocks)
    _check_context(recipe, first, blocks[0].capacity)
    plan = Plan(
        name=recipe.name,
        facts=first,
        dtype=recipe.model.dtype,
        batch=recipe.inputs.batch,
        images=recipe.inputs.images,
        text_tokens=recipe.inputs.text_tokens,
        new_tokens=recipe.inputs.new_tokens,
        chunk=recipe.inputs.chunk,
        decode_width=recipe.target.decode_width,
        turns=recipe.inputs.turns,
        vision=vision,
        blocks=blocks,
        cuts=cuts,
        windows=family.windows(files),
        rope_axes=first.decoder.rope_axes,
        quantize=_quantize(recipe, stored_decoder(files, first.decoder)),
        memory_tight=recipe.target.memory_tight,
        runtime=recipe.target.runtime,
        towers=towers,
    )
    return sum_in_blocks(plan)


def _sizes(recipe: Recipe, family: type[Family], files: ModelFiles) -> tuple[tuple[int, int], ...]:
    sizes = recipe.inputs.buckets or (family.default_size(files),)
    place = recipe.origin(("inputs", "image_size"))
    if len(sizes) > 1 and not family.several_buckets:
        raise LegalityError(
            f"{place}: image_size names {len(sizes)} buckets, the family '{family.name}' has one; write one [height, width]"
        )
    if recipe.inputs.fit is not None and recipe.inputs.fit not in family.fits:
        raise LegalityError(
            f"{recipe.origin(('inputs', 'fit'))}: fit '{recipe.inputs.fit}' does not exist in the family '{family.name}'; choose one of "
            f"{', '.join(family.fits)}"
        )
    return sizes


def _facts(recipe: Recipe, family: type[Family], files: ModelFiles, size: tuple[int, int]) -> ModelFacts:
    """Read the model's numbers for a bucket; a size that the model cannot take is the recipe's fault, and named there."""
    try:
        return family.facts(files, size)
    except ModelError as error:
        if not recipe.inputs.buckets:
            raise
        family.facts(files, family.default_size(files))  # raises when it is the model's fault after all
        raise LegalityError(f"{recipe.origin(('inputs', 'image_size'))}: {error}") from error


def _check_context(recipe: Recipe, facts: ModelFacts, capacity: int) -> None:
    if capacity > facts.decoder.context:
        raise LegalityError(
            f"{recipe.origin(('inputs',))}: pictures, text_tokens and new_tokens make {capacity} tokens, the model was made for "
            f"{facts.decoder.context}; "
            "lower inputs.images, inputs.text_tokens or inputs.new_tokens, or compress before the decoder"
        )


def _quantize(recipe: Recipe, stored: QuantizePlan | None) -> dict[str, QuantizePlan]:
    """The scheme of each part: what the recipe asks for, or what the checkpoint brings."""
    found: dict[str, QuantizePlan] = {}
    for part in PARTS:
        wanted = recipe.quantize.part(part)
        if part == "decoder" and stored is not None and stored.stored is not None:
            if wanted is not None:
                raise LegalityError(
                    f"{recipe.origin(('quantize', 'decoder'))}: quantize.decoder: the checkpoint's decoder is already quantized "
                    f"({stored.weights}, {stored.stored.method}), and its codes are taken as they are; remove it, or name the unquantized "
                    "model"
                )
            found[part] = stored
        elif wanted is not None:
            block = wanted.block or (16 if wanted.weights == "nvfp4" else 128)
            found[part] = QuantizePlan(wanted.weights, block, wanted.keep, wanted.activations, wanted.algorithm, wanted.smooth)
    return found


# --------------------------------------------------------------------------------------------------------------- vision
_ORDER = {"input": 0, "encoder": 1, "projector": 2}


def _vision(
    index: int, size: tuple[int, int], recipe: Recipe, family: type[Family], files: ModelFiles, entries: Sequence[Entry]
) -> VisionPlan:
    """Follow one bucket through `input`, encoder and projector."""
    facts = _facts(recipe, family, files, size)
    layout = Layout((Segment("visual", size[0] * size[1], size),), width=3)
    stages: list[StagePlan] = []
    for entry, stage in _at(entries, "input"):
        layout = _through(entry, stage, layout, facts, stages)
    if stages:
        rows, columns = layout.grid or (0, 0)
        patch = facts.encoder.patch
        facts = family.facts(files, size, (rows // patch, columns // patch))
    encoder = facts.encoder
    patches = Segment("visual", encoder.grid[0] * encoder.grid[1], encoder.grid)
    heads = (Segment("class", encoder.class_tokens),) if encoder.class_tokens else ()
    layout = Layout((*heads, patches), width=encoder.width)
    for entry, stage in _at(entries, "encoder"):
        if stage.at.layer is not None and stage.at.layer >= encoder.layers:
            raise LegalityError(
                f"{entry.origin('at')}: {stage.at} does not exist: {encoder.layers} encoder layers are in use; the last is "
                f"{encoder.layers - 1}"
            )
        layout = _through(entry, stage, layout, facts, stages)
    layout = _project(layout, facts, entries, stages)
    for entry, stage in _at(entries, "projector"):
        if stage.at.point is None:
            layout = _through(entry, stage, layout, facts, stages)
    _check_places(layout, facts, entries, stages)
    return VisionPlan(index, size, encoder.grid, facts, tuple(stages), layout.tokens, layout.grid, layout.barrier)


def _project(layout: Layout, facts: ModelFacts, entries: Sequence[Entry], stages: list[StagePlan]) -> Layout:
    """Drop class tokens and let the projector join patches (a merger needs its raster), or let the stage that replaces it act."""
    segments = tuple(s for s in layout.segments if s.kind == "visual")
    merge = facts.encoder.merge
    replacing = [(e, s) for e, s in _at(entries, "projector") if s.at.point == "replace"]
    if len(replacing) > 1:
        first, second = replacing[0][0], replacing[1][0]
        raise LegalityError(
            f"{second.origin('at')}: method '{second.name}' at projector.replace: '{first.name}' replaces the projector already, and "
            "there is one; remove one of the 2 entries"
        )
    if replacing:
        entry, stage = replacing[0]
        if merge > 1 and layout.grid != facts.encoder.grid:
            raise LegalityError(
                f"{entry.origin('at')}: method '{entry.name}' at projector.replace takes the patches of this family in raster order, and a "
                f"stage in the encoder left no {facts.encoder.grid[0]}x{facts.encoder.grid[1]} raster of them; remove that entry"
            )
        return _through(entry, stage, Layout(segments, width=facts.encoder.width), facts, stages)
    if merge > 1:
        grid = layout.grid
        if grid is None or grid[0] % merge or grid[1] % merge:
            culprit = [e for e, _ in _at(entries, "encoder")][-1]
            raise LegalityError(
                f"{culprit.origin('at')}: method '{culprit.name}' leaves no {merge}x{merge} raster, which the projector of this family "
                "merges; "
                "use it at projector, or choose a method that keeps the raster"
            )
        grid = (grid[0] // merge, grid[1] // merge)
        segments = (Segment("visual", grid[0] * grid[1], grid),)
    return Layout(segments, width=facts.decoder.width)


def _at(entries: Sequence[Entry], part: str) -> list[tuple[Entry, Stage]]:
    """Stages of one part in the order they run; recipe order within a place."""
    found = [(e, s) for e in entries for s in e.stages if s.at.part == part]
    if part == "encoder":
        last = 1 << 30
        found.sort(key=lambda item: (last if item[1].at.layer is None else item[1].at.layer, item[1].at.point == "mid"))
    return found


def _check_places(layout: Layout, facts: ModelFacts, entries: Sequence[Entry], stages: Sequence[StagePlan]) -> None:
    """Refuse tokens without a place in the picture where the decoder's rotary positions are rows and columns."""
    if facts.decoder.rope_axes == 1 or layout.grid is not None:
        return
    for stage in stages:
        if stage.stage.at.point == "replace" or stage.after.tokens > stage.before.tokens:
            entry = entries[stage.entry]
            raise LegalityError(
                f"{entry.origin('at')}: method '{entry.name}' at {stage.stage.at} makes tokens of its own, and what leaves the picture "
                f"is no raster; this decoder's {facts.decoder.rope_axes} rotary axes need a row and a column for each; use a method that "
                "leaves a raster, such as pool"
            )


def _through(entry: Entry, stage: Stage, layout: Layout, facts: ModelFacts, stages: list[StagePlan]) -> Layout:
    """Ask the method what comes out of a stage that runs behind `stages`; its refusal becomes an error at the recipe's line."""
    weights = bind(entry, facts)
    if (broken := broken_tie(stage, entry.index, stages)) is not None:
        raise LegalityError(f"{entry.origin('at')}: method '{entry.name}' at {stage.at} {broken}")
    try:
        after = entry.method.layout(stage, layout, entry.config, facts)
    except ValueError as error:
        raise LegalityError(f"{entry.origin()}: method '{entry.name}' at {stage.at}: {error}") from error
    room = stage.at.part == "projector" or (stage.at.part == "encoder" and stage.at.layer is None)
    if after.tokens > layout.tokens and not (entry.method.grows and room):
        fix = "use it at encoder, projector or projector.replace, where tokens may be added" if entry.method.grows else "lower its budget"
        raise LegalityError(
            f"{entry.origin()}: method '{entry.name}' at {stage.at} would keep {after.tokens} of {layout.tokens} tokens; {fix}"
        )
    if not after.tokens and (stage.at.part != "decoder" or not stage.at.layer):
        raise LegalityError(
            f"{entry.origin()}: method '{entry.name}' at {stage.at} leaves 0 of {layout.tokens} tokens, so that no decoder layer would "
            "see the picture; keep some, or use decoder.1 or later"
        )
    if layout.barrier and after.barrier != layout.barrier:
        raise LegalityError(
            f"{entry.origin()}: method '{entry.name}' at {stage.at} is behind the {layout.barrier} tokens that hide the picture from the "
            "text and does not keep them; put it before the method that makes them"
        )
    if after.barrier and (stage.at.part != "projector" or after.barrier > after.tokens):
        raise LegalityError(
            f"{entry.origin()}: method '{entry.name}' at {stage.at} hides all but the last {after.barrier} of {after.tokens} tokens; "
            "only a stage at projector or projector.replace may, by tokens that it leaves"
        )
    _check_width(entry, stage, layout, after, facts)
    stages.append(StagePlan(entry.index, entry.name, entry.config, stage, layout, after, entry.scope, weights))
    return after


def _check_width(entry: Entry, stage: Stage, before: Layout, after: Layout, facts: ModelFacts) -> None:
    """Refuse a number of channels that what comes next cannot take; only a replaced projector changes it."""
    replaces = stage.at.point == "replace"
    wanted = facts.decoder.width if replaces else before.width
    if after.width != wanted:
        taker = (
            "decoder" if replaces or stage.at.part in ("projector", "decoder") else "encoder" if stage.at.part == "input" else "projector"
        )
        fix = "set its options so" if replaces else "only a method at projector.replace may change them: use it there"
        raise LegalityError(
            f"{entry.origin('at')}: method '{entry.name}' at {stage.at} leaves tokens of {after.width} channels, the {taker} takes "
            f"{wanted}; {fix}"
        )


# -------------------------------------------------------------------------------------------------------------- decoder
@dataclass
class _Place:
    """Where the walk through the decoder stands.

    Attributes:
        visual: visual tokens of one picture.
        grid: their raster, if they form one.
        entered: recipe entry → what it first saw.
        alone: visual tokens that a turn with one picture leaves; more than `visual` behind a joint budget, which one picture may use up.
        run: all stages so far, those before the decoder too.
        mixed: the cut at which a joint budget was shared out, so that no picture has a known count any more.
    """

    visual: int
    grid: tuple[int, int] | None
    entered: dict[int, int | None]
    alone: int
    run: list[StagePlan]
    mixed: int | None = None


def _decoder(
    recipe: Recipe, facts: ModelFacts, entries: Sequence[Entry], vision: Sequence[VisionPlan], splits: Sequence[int]
) -> tuple[tuple[BlockPlan, ...], tuple[CutPlan, ...]]:
    """Cut the decoder at every stage (and split), and count tokens from cut to cut."""
    inputs, layers = recipe.inputs, facts.decoder.layers
    by_layer: dict[int, list[tuple[Entry, Stage]]] = {}
    for entry, stage in _at(entries, "decoder"):
        layer = cast(int, stage.at.layer)
        _check_cut(entry, stage, layers, inputs.images)
        by_layer.setdefault(layer, []).append((entry, stage))
    inner = sorted({*by_layer, *splits} - {0})
    edges = [0, *inner, layers]
    visual, grid = max((v.tokens for v in vision), default=0), vision[0].out_grid if len(vision) == 1 else None
    place = _Place(visual, grid, {}, visual, run=list(vision[0].stages) if vision else [])
    blocks: list[BlockPlan] = []
    cuts: list[CutPlan] = []

    def tokens(v: int) -> int:
        return inputs.images * v + inputs.text_tokens

    for index, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if first in by_layer:
            before = place.visual
            stages = _cut(recipe, facts, by_layer[first], place)
            positions: Positions = next((s.after.positions for s in reversed(stages) if s.after.positions != "keep"), "keep")
            cut = CutPlan(
                index, first, stages, tokens(before), tokens(place.visual), inputs.images * before, inputs.images * place.visual, positions
            )
            cuts.append(cut)
            if blocks and cut.attention("previous"):
                blocks[-1] = replace(blocks[-1], query_rows={first - 1: handed_rows(cut.attention("previous"))})
        capacity = tokens(max(place.visual, place.alone)) + inputs.new_tokens
        blocks.append(BlockPlan(index, first, last, tokens(place.visual), place.visual, capacity, head=last == layers))
    return tuple(blocks), tuple(cuts)


def _cut(recipe: Recipe, facts: ModelFacts, found: Sequence[tuple[Entry, Stage]], place: _Place) -> tuple[StagePlan, ...]:
    """Run the layouts of all stages of one cut; `place` moves on."""
    images, start = recipe.inputs.images, len(place.run)
    for entry, stage in found:
        if place.mixed is not None and (entry.scope != "joint" or stage.at.layer != place.mixed):
            raise LegalityError(
                f"{entry.origin('scope')}: method '{entry.name}' at {stage.at} comes after a stage of scope: joint at "
                f"decoder.{place.mixed}, where pictures lost their own counts; a joint stage must be the last: "
                "leave out scope: joint, or this stage"
            )
        if not place.visual:
            raise LegalityError(
                f"{entry.origin('at')}: method '{entry.name}' at {stage.at} gets 0 visual tokens: an earlier stage left none; remove the "
                "entry, or put it first"
            )
        joint = images if entry.scope == "joint" else 1
        place.mixed = stage.at.layer if joint > 1 else place.mixed
        layout = Layout((Segment("visual", place.visual * joint, place.grid if joint == 1 else None),), width=facts.decoder.width)
        after = _through(entry, stage, replace(layout, entry_tokens=place.entered.get(entry.index)), facts, place.run)
        place.entered[entry.index] = after.entry_tokens
        if joint > 1 and after.tokens % images:
            raise LegalityError(
                f"{entry.origin()}: scope: joint keeps {after.tokens} tokens over {images} pictures; choose a budget that {images} divides"
            )
        place.visual, place.grid = after.tokens // joint, after.grid if joint == 1 else None
        place.alone = min(place.alone, after.tokens)
    return tuple(place.run[start:])


def _check_cut(entry: Entry, stage: Stage, layers: int, images: int) -> None:
    layer, site = cast(int, stage.at.layer), stage.at
    if images == 0:
        raise LegalityError(f"{entry.origin('at')}: {site} compresses pictures, but inputs.images is 0; remove the entry")
    if not 0 <= layer < layers:
        raise LegalityError(
            f"{entry.origin('at')}: {site} does not exist: the decoder has {layers} layers; the last cut is decoder.{layers - 1}"
        )
    if site.point is not None:
        raise LegalityError(f"{entry.origin('at')}: {site}: a cut inside a decoder layer is not built yet; use decoder.{layer}")
    if layer == 0 and any(isinstance(n, Attention) and n.layer == "previous" for n in stage.needs):
        raise LegalityError(
            f"{entry.origin('at')}: method '{entry.name}' scores with the layer before {site}, and there is none; use decoder.1 or later"
        )
