"""What the runtime follows: which graph runs when, on how many tokens. Plain data, part of the manifest.

Legend: T new tokens, P past slots, S_i tokens a prompt brings to block i, C_i its slots, r rotary axes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveFloat

__all__ = [
    "BlockProgram", "CutProgram", "GraphPhase", "PhaseName", "Program", "RowSum", "SlotCodes", "StateProgram", "TowerProgram",
    "VisionProgram",
]  # fmt: skip

PhaseName = Literal["prefill", "chunk", "decode"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GraphPhase(_Frozen):
    """A static graph: its file in the bundle, T and P."""

    file: str
    tokens: int
    past: int = 0


class StateProgram(_Frozen):
    """What stages of one recipe entry hand from one graph to another.

    Attributes:
        entry: number of the entry in the recipe's `compress` list.
        name: what the method calls it; the output is `state.<entry>.<name>`, the input `past_state.<entry>.<name>`.
        shape: one item per picture first, or one for all of them.
        dtype: numpy's name.
    """

    entry: int
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def output(self) -> str:
        """Its name where it leaves a graph."""
        return f"state.{self.entry}.{self.name}"

    @property
    def input(self) -> str:
        """Its name where it enters one."""
        return f"past_state.{self.entry}.{self.name}"


class TowerProgram(_Frozen):
    """A text tower: run once for the question of a turn that brings pictures.

    Attributes:
        file: the graph `ids [1, tokens]` → `embedding [1, width]`.
        folder: of its tokenizer in the bundle.
        tokens: ids that it takes; longer questions are cut, shorter ones padded.
        width: channels of the embedding.
    """

    file: str
    folder: str
    tokens: int
    width: int


class VisionProgram(_Frozen):
    """A picture bucket.

    Attributes:
        file: the graph `pixels` → `tokens`, `source.<n>`, `state.<entry>.<name>`.
        tokens: visual tokens that leave it.
        full_grid: raster of the uncompressed tokens.
        grid: raster of the tokens that leave, when they form one.
        barrier: how many of the last ones hide what stands before them from what follows; blocks then take `since`.
        stages: names of the methods that run inside, one per `source.<n>`.
        rule: the picture rule, as `ImageRule.to_json` writes it.
        states: what leaves the graph for a cut, of one picture.
        towers: text towers whose embedding of the question is an input `text.<n>` `[1, width]`.
    """

    file: str
    tokens: int
    full_grid: tuple[int, int]
    grid: tuple[int, int] | None
    barrier: int = 0
    stages: tuple[str, ...]
    rule: dict[str, JsonValue]
    states: tuple[StateProgram, ...] = ()
    towers: tuple[int, ...] = ()


class RowSum(_Frozen):
    """A sum over rows of a layer's attention map: which rows, and how heads are joined before."""

    rows: Literal["all", "visual", "text"]
    heads: Literal["mean", "max", "sum", "none"]


class SlotCodes(_Frozen):
    """Keys and values lie in the slots as codes: a row is what its codes stand for, times the scale of its KV head.

    Attributes:
        dtype: of the codes: int8, or fp8, which is E4M3 without infinities (ONNX's FLOAT8E4M3FN).
        scales: `<layer>.key` and `<layer>.value` → a scale per KV head, `[g]`.
    """

    dtype: Literal["int8", "fp8"]
    scales: dict[str, tuple[PositiveFloat, ...]]

    @property
    def held(self) -> str:
        """Numpy's name of what the codes are held as; it has no fp8, whose codes are bytes."""
        return "uint8" if self.dtype == "fp8" else self.dtype


class BlockProgram(_Frozen):
    """A run of decoder layers `[first, last)` with its static graphs.

    Attributes:
        query_rows: layer → the query rows that it hands out for the cut behind it, as `query.<l>`.
        row_sums: layer → the sums that it hands out, as `sums.<l>.<n>`; its prefill and chunk graphs then take `text`.
    """

    index: int
    first: int
    last: int
    tokens: int
    capacity: int
    query_rows: dict[int, Literal["last", "all"]] = Field(default_factory=dict)
    row_sums: dict[int, tuple[RowSum, ...]] = Field(default_factory=dict)
    head: bool
    phases: dict[PhaseName, GraphPhase]


class CutProgram(_Frozen):
    """The compress graph before a block.

    Attributes:
        previous: it scores with the layer before: it gets that layer's keys and query rows.
        sums: how many sums over rows of the layer before it takes from that layer's block.
        next: it scores with the layer after: it gets the keys that earlier turns left there.
        kv: earlier layers whose KV rows it prunes.
        methods: one per stage, each with its `kept.<n>`; a last stage that leaves no token (`visual_out` 0) has none.
        text: places for the turn's text tokens; 0 where no stage reads them.
        entering, leaving: states that it reads, and that it hands to later cuts.
        towers: text towers whose embeddings of each picture's question are an input `text.<n>` `[images, width]`.
    """

    before_block: int
    layer: int
    file: str
    tokens_in: int
    tokens_out: int
    visual_in: int
    visual_out: int
    positions: Literal["keep", "renumber", "truncate"]
    previous: bool
    next: bool
    sums: int = 0
    kv: tuple[int, ...] = ()
    methods: tuple[str, ...]
    text: int = 0
    entering: tuple[StateProgram, ...] = ()
    leaving: tuple[StateProgram, ...] = ()
    towers: tuple[int, ...] = ()


class Program(_Frozen):
    """Everything the runtime needs besides the graphs and the tokenizer.

    Attributes:
        dtype: of hidden states, and of KV without codes: float32 or float16.
        position_rule: how rotary positions are counted.
        image_token, image_text, eos: token rules.
        memory_tight: the CPU path keeps one copy of the weights and is slower.
        towers: text encoders of their own, each with its tokenizer.
        kv: how keys and values are stored; None: in `dtype`, as they are.
    """

    family: str
    dtype: Literal["float32", "float16"]
    batch: int
    images: int
    width: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_axes: int
    position_rule: Literal["sequential", "mrope"]
    text_tokens: int
    new_tokens: int
    chunk: int
    turns: Literal["freeze", "recompute"]
    memory_tight: bool = False
    image_token: int
    image_text: str
    eos: tuple[int, ...]
    vision: tuple[VisionProgram, ...]
    embed: dict[PhaseName, GraphPhase]
    blocks: tuple[BlockProgram, ...]
    cuts: tuple[CutProgram, ...]
    towers: tuple[TowerProgram, ...] = ()
    kv: SlotCodes | None = None

    @property
    def slot_kind(self) -> str:
        """What the slots hold: `dtype`, int8 or fp8."""
        return self.dtype if self.kv is None else self.kv.dtype

    @property
    def slot_dtype(self) -> str:
        """Numpy's name of what the slots hold."""
        return self.dtype if self.kv is None else self.kv.held

    @property
    def barrier(self) -> int:
        """Tokens at the end of a picture that hide what stands before them; the same in all buckets."""
        return max((v.barrier for v in self.vision), default=0)

    def cut_before(self, block: int) -> CutProgram | None:
        """Return the cut before a block, if there is one."""
        return next((c for c in self.cuts if c.before_block == block), None)
