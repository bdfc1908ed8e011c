"""The method contract: what a compression method declares, what it gets and what it gives back.

A method is a class with four functions. Three of them (`stages`, `weights`, `layout`) answer with plain numbers and never
import torch, so that a plan can be made without it; `apply` computes on tensors of static shape. The framework moves
positions, masks, features and key biases along `source` and `mix`; a method never touches them.

Legend: b batch (under `scope: image` every picture is an item of the batch), n candidates that arrive, k tokens that leave, c channels,
m text tokens, h heads, r rotary axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from tmc_export.core.facts import ModelFacts
from tmc_export.graphs._needs import Attention, Features, Keys, Need, TextEmbeds, TextTower

if TYPE_CHECKING:
    from torch import Tensor

    from tmc_export.graphs._fitting import Evidence, Fitted

__all__ = [
    "Attention",
    "Budget",
    "Compressed",
    "Context",
    "Features",
    "Keys",
    "Layout",
    "Method",
    "MethodConfig",
    "Need",
    "Positions",
    "Sample",
    "Segment",
    "Site",
    "Stage",
    "TextEmbeds",
    "TextTower",
]

Positions = Literal["keep", "renumber", "truncate"]
Shape = tuple[int, ...]


# --------------------------------------------------------------------------------------------------------------- sites
_SITE = re.compile(r"^(input|encoder|projector|decoder|prefill_end|step)(?:\.(\d+))?(?:\.(mid|replace))?$")


@dataclass(frozen=True)
class Site:
    """Where a stage acts.

    Written `input`, `encoder.<l>`, `encoder.<l>.mid`, `encoder`, `projector`, `projector.replace`, `decoder.<k>`,
    `decoder.<k>.mid`, `prefill_end` or `step.<k>`. `decoder.2` is after the first two layers, `decoder.0` the assembled
    embeddings, `encoder` after the last encoder layer in use; `.mid` is between attention and feed-forward of that (0-based) layer.

    >>> Site.parse("encoder.3.mid")
    Site(part='encoder', layer=3, point='mid')
    """

    part: str
    layer: int | None = None
    point: str | None = None

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site; raises `ValueError` that lists the forms."""
        match = _SITE.match(text)
        bad = match is None
        if match is not None:
            part, layer, point = match.group(1), match.group(2), match.group(3)
            bad = (
                (part in ("decoder", "step") and layer is None)
                or (part in ("input", "projector", "prefill_end") and layer is not None)
                or (point == "mid" and (layer is None or part not in ("encoder", "decoder")))
                or (point == "replace" and part != "projector")
            )
        if match is None or bad:
            raise ValueError(
                f"'{text}' is not a site; write input, encoder, encoder.<l>, encoder.<l>.mid, projector, projector.replace, "
                "decoder.<k>, decoder.<k>.mid, prefill_end or step.<k>"
            )
        return cls(match.group(1), None if match.group(2) is None else int(match.group(2)), match.group(3))

    def __str__(self) -> str:
        return ".".join(str(p) for p in (self.part, self.layer, self.point) if p is not None)


# -------------------------------------------------------------------------------------------------------------- budget
@dataclass(frozen=True)
class Budget:
    """How many tokens stay: a share of what arrives (`"50%"`) or a number of tokens.

    >>> Budget.parse("50%").of(577), Budget.parse(64).of(577)
    (288, 64)
    """

    share: float | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, value: object) -> Budget:
        """Read `"50%"` or a whole number of tokens; raises `ValueError`."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError(f"a budget keeps at least 1 token, got {value}")
            return cls(tokens=value)
        if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value.strip())):
            percent = float(match.group(1))
            if not 0 < percent <= 100:
                raise ValueError(f"a budget is above 0% and at most 100%, got {value}")
            return cls(share=percent / 100)
        raise ValueError(f"a budget is a percentage such as '50%' or a number of tokens, got {value!r}")

    def of(self, arriving: int, rounding: Literal["half_even", "floor", "ceil"] = "half_even") -> int:
        """Return the number of tokens that stay of `arriving`; `rounding` follows the method's official code."""
        if self.tokens is not None:
            return self.tokens
        exact = arriving * (self.share or 0.0)
        if rounding == "floor":
            return int(exact)
        return -int(-exact // 1) if rounding == "ceil" else round(exact)

    def __str__(self) -> str:
        return f"{(self.share or 0) * 100:g}%" if self.tokens is None else str(self.tokens)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=core_schema.to_string_ser_schema())

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "pattern": r"^\d+(\.\d+)?\s*%$"}, {"type": "integer", "minimum": 1}]}


class MethodConfig(BaseModel):
    """The options of a method in a recipe; every method's `Config` derives from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# -------------------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True)
class Stage:
    """One cut that a method makes.

    Attributes:
        at: where.
        needs: what to capture for it.
        index: 0-based number of the cut within its recipe entry.
        tied: reads a state with a value per token, or tokens that it knows by their place, from this entry's stage before it. A plan
            refuses other entries that change the tokens in between.
    """

    at: Site
    needs: tuple[Need, ...] = ()
    index: int = 0
    tied: bool = False


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind. `grid` is (rows, columns) while the tokens still form a raster, else None."""

    kind: Literal["class", "visual"]
    tokens: int
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """What one picture's tokens look like at a place.

    Attributes:
        segments: runs of tokens, in order.
        width: channels.
        positions: what happens to rotary positions at this cut; only read at decoder sites. `keep`: every token has its own. `renumber`:
            they count on from where the layers behind the cut stopped, without gaps. `truncate`: the k tokens of a turn take the first k of
            the positions that arrived. In a first turn the last two are the same. A later turn starts, under `truncate`, at the position it
            has before the cut, so that a gap stands for what earlier turns lost; under `renumber`, behind the last token. The next
            token's position is one more than the last one (under `keep`: than the last one that arrived).
        kv_rows: decoder layer → visual KV rows left in a layer *before* the cut (retroactive pruning); empty when untouched.
        barrier: tokens at the end of a picture that hide everything before them, the picture and what the conversation said so far, from
            all that follows (VoCo): no later token sees a key before the first of them, and once the turn is prefilled the turn's rows
            before it leave the KV of every layer. At `projector` or `projector.replace`, by the last stage there, with
            `inputs.images: 1` and no cut in the decoder; 0: nothing is hidden.
        entry_tokens: candidates that arrived at the first cut of the recipe entry, for methods that budget against them (PyramidDrop);
            such a method's own `layout` sets it at its first stage and reads it at the later ones; every other layout leaves None.
        synthetic: tokens of a decoder site that no layer has seen (source -1); a plan refuses stages behind them, at the same cut, that
            ask for attention or name KV rows.
    """

    segments: tuple[Segment, ...]
    width: int
    positions: Positions = "keep"
    kv_rows: Mapping[int, int] = field(default_factory=dict)
    entry_tokens: int | None = None
    barrier: int = 0
    synthetic: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all segments."""
        return sum(s.tokens for s in self.segments)

    @property
    def class_tokens(self) -> int:
        """Tokens of the class segments; they come first."""
        return sum(s.tokens for s in self.segments if s.kind == "class")

    @property
    def grid(self) -> tuple[int, int] | None:
        """The raster of the visual tokens, if there is exactly one visual segment and it still is a raster."""
        visual = [s for s in self.segments if s.kind == "visual"]
        return visual[0].grid if len(visual) == 1 else None


@dataclass(frozen=True)
class Context:
    """What a method may read in `apply`; tensors of static shape.

    Attributes:
        layout: the static layout of the candidates.
        facts: the model's numbers.
        valid: `[b, n]` bool; false for padding (fewer pictures than the bucket). Invalid candidates must rank last.
        source: `[b, n]` int64; the original index of every candidate among the uncompressed tokens of its picture, -1 = synthetic.
        positions: `[r, b, n]` int64 rotary positions; decoder sites only.
        text, text_valid: `[b, m, c]` and `[b, m]` bool; the turn's text tokens in their order, packed: m is the recipe's `text_tokens`
            (in the reference what the turn has), and what follows the last one is zero and not valid. When `TextEmbeds` was asked for;
            `text_valid` also with attention rows of `text` that are not summed. Every picture of a turn has the whole turn's text.
        captured: what `Stage.needs` asked for, by need.
        state: what the previous stage of the same recipe entry put into `Compressed.state`, in this graph or an earlier one; stages of
            other entries in between do not matter. Under `scope: image` one item per picture; a missing picture's says nothing.
        weights: learned weights by state-dict name.
    """

    layout: Layout
    facts: ModelFacts
    valid: Tensor
    source: Tensor
    positions: Tensor | None = None
    text: Tensor | None = None
    text_valid: Tensor | None = None
    captured: Mapping[Need, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Compressed:
    """What leaves a stage.

    Attributes:
        tokens: `[b, k, c]`.
        source: `[b, k]` int64 index into the *candidates* (0…n-1) whose place the token takes; -1 = synthetic. At decoder sites ascending,
            synthetic tokens behind all others: they stand directly behind the picture's last kept token. Places stay within the picture:
            the j-th of k valid tokens has its own place, but at most that of candidate n - k + j (of n valid ones), a synthetic one exactly
            that. With positions kept, a synthetic token has the rotary position of the picture's last candidate.
        valid: `[b, k]` bool; no more valid tokens leave than valid candidates arrived, further ones are dropped.
        assign: `[b, n]` int64; the output row that each candidate was merged into, -1 = dropped. None when nothing was merged.
        mix: `[b, k, n]` the linear map from candidates to tokens, when the method is one.
        state: handed to the next stage of the same recipe entry; the batch axis first, static shapes. Where tokens are dropped in between,
            a state with a value per token is the method's to gather.
        key_bias: `[b, k]` added to the attention logits of these keys in later encoder layers (proportional attention).
        text: `[b, m, c]` replaces the text tokens, m as in `Context.text`; see `Method.replaces_text`.
        kv: decoder layer → `[b, rows]` int64 candidates whose KV rows stay in that earlier layer.
    """

    tokens: Tensor
    source: Tensor
    valid: Tensor
    assign: Tensor | None = None
    mix: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    key_bias: Tensor | None = None
    text: Tensor | None = None
    kv: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One way to use a method; the conformance suite tries every one.

    Attributes:
        at: the site.
        options: as a recipe has them.
        too_much: options that ask for more than arrives, which `layout` must refuse; not needed where the options hold a `Budget`.
        arriving: the candidates of one item, where a plain picture of the made-up model does not do (thumbnail and crops).
    """

    at: str
    options: Mapping[str, Any] = field(default_factory=dict)
    too_much: Mapping[str, Any] = field(default_factory=dict)
    arriving: Layout | None = None


class Method:
    """Base of all methods: class-level facts, and the four functions. Methods hold no state and are never instantiated.

    Attributes:
        name: set by registration's name.
        paper: title, venue and arXiv number.
        official: repository and file of the official code, or `"paper only"`.
        mechanism: transform, similarity, attention, query, or control.
        modality: image, video or audio.
        sites: forms of `at` the method accepts, with `<l>`/`<k>` for a layer: `("projector", "decoder.<k>")`.
        query_aware: what is kept depends on the prompt.
        training_free: works without learned weights of its own.
        budgets: what the official code leaves to the data and an option fixes here, in a few words; empty: static by nature.
        grows: more tokens may leave a stage than arrive (register tokens appended); else a plan refuses that.
        replaces_text: `Compressed.text` is set: the picture is fused into the prompt. Only at `decoder.0`, with `TextEmbeds` asked for, and
            with one picture or `scope: joint`, because no rule says how several pictures share the text. A turn without pictures keeps
            its text as it is.
        fitted: what `fit` finds: names of options, and `at` where it sets the site. Empty: nothing to fit.
        goals: what a fitting can be asked to meet, with the default: `flops`, the share of the decoder layers' operations in a full prefill
            that stays, or `divergence`, in nats.
        samples: further sites and options for the conformance suite; without any, the default options at the first site are tried.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str]
    official: ClassVar[str]
    mechanism: ClassVar[Literal["transform", "similarity", "attention", "query", "control"]]
    modality: ClassVar[Literal["image", "video", "audio"]] = "image"
    sites: ClassVar[tuple[str, ...]]
    query_aware: ClassVar[bool] = False
    training_free: ClassVar[bool] = True
    budgets: ClassVar[str] = ""
    grows: ClassVar[bool] = False
    replaces_text: ClassVar[bool] = False
    fitted: ClassVar[tuple[str, ...]] = ()
    goals: ClassVar[Mapping[str, float]] = {}
    samples: ClassVar[tuple[Sample, ...]] = ()

    Config: type[MethodConfig] = MethodConfig

    @staticmethod
    def stages(at: Site, config: Any, facts: ModelFacts) -> tuple[Stage, ...]:
        """Return the cuts this recipe entry makes; raises `ValueError` with the reason and the fix when it cannot work."""
        return (Stage(at),)

    @staticmethod
    def weights(config: Any, facts: ModelFacts) -> Mapping[str, Shape]:
        """Return the learned weights by state-dict name."""
        return {}

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: Any, facts: ModelFacts) -> Layout:
        """Return what comes out of the stage; raises `ValueError` with the reason and the fix when the budget cannot be met."""
        raise NotImplementedError

    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: Any) -> Compressed:
        """Compress the candidates `[b, n, c]`; deterministic, static shapes, standard operators."""
        raise NotImplementedError

    @staticmethod
    def fit(config: Any, facts: ModelFacts, evidence: Evidence, goals: Mapping[str, float]) -> Fitted:
        """Find what `fitted` names on calibration prompts, for `tmc-export fit`; deterministic.

        Args:
            config: the options as the recipe has them.
            facts: the model's numbers.
            evidence: the model; see `graphs/_fitting.py`.
            goals: a value for every name in `goals`.

        Raises:
            ValueError: a goal cannot be met, with the reason and the fix.
        """
        raise NotImplementedError
