"""What a plan says, as frozen data. Everything downstream reads these and nothing else of the recipe.

Legend: S_i tokens that a prompt's bucket brings to block i, C_i its KV slots, v visual tokens of one picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._contract import Attention, Layout, MethodConfig, Positions, Stage, TextTower
from tmc_export.recipe import ActivationScheme, WeightScheme

__all__ = ["BlockPlan", "CutPlan", "LearnedWeights", "Plan", "QuantizePlan", "StagePlan", "StoredCodes", "TowerPlan", "VisionPlan"]


@dataclass(frozen=True)
class LearnedWeights:
    """The learned weights that a method's entry declares, and where they come from: a file or a seed.

    Attributes:
        shapes: the method's name of a tensor → its shape.
        file: as the recipe writes it; None when they are random.
        prefix: what stands before the names in the file.
        random: the seed, when they are random.
        path: the file on this machine; not part of what a plan says, and left out of its JSON form.
    """

    shapes: Mapping[str, tuple[int, ...]]
    file: str | None = None
    prefix: str = ""
    random: int | None = None
    path: Path | None = field(default=None, compare=False, repr=False)

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def matrix_elements(self) -> int:
        """Numbers in the tensors of two axes or more: what tokens are multiplied with."""
        return sum(prod(shape) for shape in self.shapes.values() if len(shape) > 1)


@dataclass(frozen=True)
class TowerPlan:
    """A text tower: its own subgraph and tokenizer, run once for the question of a turn that brings pictures.

    Attributes:
        index: number of the tower; its input at the stages is `text.<index>`.
        source: as the recipe writes it.
        width: channels of the embedding.
        tokens: its context; a question is cut and padded to it.
        end: the token at whose first place the embedding is read.
        hidden, layers, heads, intermediate, vocabulary: its numbers.
        path: its folder on this machine; not part of what a plan says, and left out of its JSON form.
    """

    index: int
    source: str
    width: int
    tokens: int
    end: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    path: Path | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class StagePlan:
    """One stage of one recipe entry, with its numbers.

    Attributes:
        entry: index of the entry in the recipe's `compress` list.
        method: registered name.
        config: the method's validated options.
        stage: where, and what it needs.
        before, after: layouts of one picture (`scope: image`), or of all of them (`joint`).
        scope: whether a budget is per picture.
        weights: the entry's learned weights; None when the method has none.
    """

    entry: int
    method: str
    config: MethodConfig
    stage: Stage
    before: Layout
    after: Layout
    scope: Literal["image", "joint"] = "image"
    weights: LearnedWeights | None = None


@dataclass(frozen=True)
class VisionPlan:
    """The vision subgraph of one picture bucket.

    Attributes:
        index: number of the bucket.
        size: height and width in pixels that the processor makes.
        grid: patch rows and columns inside the encoder, after `input` stages.
        facts: the model's numbers for this bucket and grid.
        stages: stages at `input`, `encoder…` and `projector`, in the order they run.
        tokens: visual tokens that leave the graph for one picture.
        out_grid: their raster, if they still form one.
        barrier: how many of the last ones hide what stands before them from what follows; see `Layout.barrier`.
    """

    index: int
    size: tuple[int, int]
    grid: tuple[int, int]
    facts: ModelFacts
    stages: tuple[StagePlan, ...]
    tokens: int
    out_grid: tuple[int, int] | None
    barrier: int = 0

    @property
    def replacing(self) -> StagePlan | None:
        """The stage at `projector.replace`, which runs instead of the family's own projector."""
        return next((s for s in self.stages if s.stage.at.point == "replace"), None)


@dataclass(frozen=True)
class CutPlan:
    """The compress subgraph before one block.

    Attributes:
        before_block: index of the block that gets the result.
        layer: decoder layers that ran before it.
        stages: the stages of this cut, in order.
        tokens_in, tokens_out: S of the block before and of the block after.
        visual_in, visual_out: candidates and kept tokens over all pictures of the bucket.
        positions: what happens to the rotary positions.
        summed: attention needs of the layer before that its block adds up itself; see `plan.sums`.
    """

    before_block: int
    layer: int
    stages: tuple[StagePlan, ...]
    tokens_in: int
    tokens_out: int
    visual_in: int
    visual_out: int
    positions: Positions
    summed: tuple[Attention, ...] = ()

    def attention(self, layer: Literal["previous", "next"]) -> tuple[Attention, ...]:
        """Return the attention needs of this cut for the layer before or after it."""
        needs = [n for s in self.stages for n in s.stage.needs if isinstance(n, Attention) and n.layer == layer]
        return tuple(dict.fromkeys(needs))

    def scored(self, layer: Literal["previous", "next"]) -> tuple[Attention, ...]:
        """Return those that the compress graph computes from query rows and keys itself."""
        return tuple(n for n in self.attention(layer) if n not in self.summed)


@dataclass(frozen=True)
class BlockPlan:
    """A run of decoder layers.

    Attributes:
        index: number of the block.
        first, last: layers `[first, last)`.
        tokens: S_i.
        visual_tokens: visual tokens of one picture here.
        capacity: C_i.
        query_rows: layer → which scaled query rows the block hands out for the cut after it.
        head: the block ends in the norm and the output head.
        since: the mask takes a first place that each token sees.
        row_sums: layer → sums over rows of its attention map that the block hands out for the cut after it.
    """

    index: int
    first: int
    last: int
    tokens: int
    visual_tokens: int
    capacity: int
    query_rows: Mapping[int, Literal["last", "all"]] = field(default_factory=dict)
    head: bool = False
    since: bool = False
    row_sums: Mapping[int, tuple[Attention, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredCodes:
    """Codes that the checkpoint brings, which go into the graphs as they are; see `core.stored_codes.StoredScheme`.

    Attributes:
        method: `gptq`, `awq` or `compressed-tensors`.
        group: input channels that share a scale in the checkpoint; 0: a scale per output channel.
        zero_points: whether codes may have other zero points than their middle.
        scattered: whether a group may be any input channels, so that products read their input in another order.
        inputs, kv: what its maker's runtime rounds the inputs of products, and keys and values, to; empty: nothing.
    """

    method: str
    group: int
    zero_points: bool = False
    scattered: bool = False
    inputs: str = ""
    kv: str = ""


@dataclass(frozen=True)
class QuantizePlan:
    """The scheme of one part.

    Attributes:
        weights: how weights are stored.
        block: input channels that share a scale, for `int4`, `nvfp4` and stored `int8` (0: a scale per output channel); others ignore it.
        keep: names of linears left as they are.
        activations: what products round their inputs to; None: weight-only.
        algorithm: how int4 codes are found.
        smooth: share of the activations' range that is moved into int8 weights; None: none.
        stored: that the checkpoint brings the codes; None: they are found when the bundle is built.
    """

    weights: WeightScheme
    block: int = 128
    keep: tuple[str, ...] = ()
    activations: ActivationScheme | None = None
    algorithm: Literal["rtn", "awq", "gptq"] = "rtn"
    smooth: float | None = None
    stored: StoredCodes | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against a model.

    Attributes:
        name: the recipe's name.
        facts: the model's numbers for the first bucket.
        dtype: of weights and activations: float32, float16 or bfloat16.
        batch: b.
        images: most pictures in a conversation.
        text_tokens, new_tokens: text tokens of all prompts, and tokens generated, in a conversation.
        chunk: T of the chunk phase.
        decode_width: T of the decode phase of TensorRT engines.
        turns: what a later turn sees of earlier pictures.
        vision: one entry per picture bucket; empty when `images` is 0.
        blocks, cuts: the decoder.
        windows: per decoder layer, its sliding window or None.
        rope_axes: rotary axes.
        quantize: scheme per part.
        memory_tight: the CPU path keeps one copy of the weights.
        runtime: what executes the bundle on its device.
        towers: text encoders that stages ask for, each once.
    """

    name: str
    facts: ModelFacts
    dtype: Literal["float32", "float16", "bfloat16"]
    batch: int
    images: int
    text_tokens: int
    new_tokens: int
    chunk: int
    decode_width: int
    turns: Literal["freeze", "recompute"]
    vision: tuple[VisionPlan, ...]
    blocks: tuple[BlockPlan, ...]
    cuts: tuple[CutPlan, ...]
    windows: tuple[int | None, ...]
    rope_axes: int
    quantize: Mapping[str, QuantizePlan] = field(default_factory=dict)
    memory_tight: bool = False
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"] = "onnxruntime"
    towers: tuple[TowerPlan, ...] = ()

    @property
    def query_aware_vision(self) -> bool:
        """Whether pictures cannot be encoded without their question, so that no picture can be shared between prompts."""
        needs = [n for v in self.vision for s in v.stages for n in s.stage.needs]
        return any(isinstance(n, TextTower) for n in needs)

    def cut_before(self, block: int) -> CutPlan | None:
        """Return the cut before a block, if there is one."""
        return next((c for c in self.cuts if c.before_block == block), None)
