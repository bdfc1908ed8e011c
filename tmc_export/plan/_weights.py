"""How many weights each part has and how many bytes they take, reckoned from the model's numbers; no checkpoint is read.

Biases of the decoder are left out (none in Llama and Mistral; below 0.1 % in Qwen2). A projector is taken as two linears: LLaVA's, whose
inner width is the decoder's, or a merger's, whose inner width is that of the joined patches. An encoder's feed-forward part is taken as
two linears; a patch embedding that is a convolution, of the schemes int8 alone stores. A method's learned weights are counted by the shapes
that it declares, once per recipe entry, with its first stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tmc_export.core.facts import DecoderFacts, ModelFacts
from tmc_export.graphs._contract import Attention, Keys
from tmc_export.plan.types import BlockPlan, Plan, StagePlan, TowerPlan

__all__ = [
    "LINEARS", "WIDTHS", "WeightBytes", "block_bytes", "cut_bytes", "decoder_linears", "embed_bytes", "encoder_weights", "head_bytes",
    "layer_bytes", "learned_bytes", "looks_ahead", "patch_kernel", "projector_weights", "projector_widths", "tower_bytes", "vision_bytes",
    "weight_bytes", "widened",
]  # fmt: skip

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number."""

LINEARS = {
    "self_attn.q_proj": ("width", "query"), "self_attn.k_proj": ("width", "key"), "self_attn.v_proj": ("width", "key"),
    "self_attn.o_proj": ("query", "width"), "mlp.gate_proj": ("width", "inner"), "mlp.up_proj": ("width", "inner"),
    "mlp.down_proj": ("inner", "width"),
}  # fmt: skip
"""The linears of a decoder layer, by their name below `layers.<l>`: input and output width. All served decoders have these seven."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights as they are stored, by part.

    Attributes:
        encoder, projector: of one picture bucket; buckets share them on disk.
        embed: the token table.
        decoder: the layers and the final norm.
        head: the output head; 0 when it is the token table as it lies (fp8 codes of it are a tensor of their own).
        cuts: query and key weights that cuts hold once more (`Attention(layer="next")`).
        methods: learned weights of methods.
        towers: text towers.
    """

    encoder: int
    projector: int
    embed: int
    decoder: int
    head: int
    cuts: int
    methods: int = 0
    towers: int = 0

    @property
    def total(self) -> int:
        """All parts, the token table once."""
        return self.encoder + self.projector + self.embed + self.decoder + self.head + self.cuts + self.methods + self.towers


def widened(plan: Plan) -> Plan:
    """The plan with weights as a runtime holds them: 16 bits beside float32 are widened as an engine is built, or a session loads.

    TensorRT-RTX stores them as float32 (`benchmarks/engine_matrix.py`), onnxruntime computes their Cast at load, but for `memory_tight`;
    of TensorRT on a board the same is assumed.
    """
    if plan.dtype != "float32":
        return plan
    kept = {part: s for part, s in plan.quantize.items() if part == "kv" or s.weights not in ("fp16", "bf16")}
    return replace(plan, quantize=kept)


def encoder_weights(facts: ModelFacts) -> int:
    """Weights of the encoder's layers in use, patch embedding, position table and class token included.

    A CLIP ViT-L layer (width 1024, inner 4096): 4·(1024² + 1024) + 2·1024·4096 + 4096 + 1024 + 4·1024 = 12,596,224.
    """
    return sum(into * out for into, out in _encoder_linears(facts)) + _encoder_rest(facts)


def patch_kernel(facts: ModelFacts) -> bool:
    """Whether the patch embedding is a convolution; of towers that join patches it is a linear."""
    return facts.encoder.merge == 1


def _encoder_linears(facts: ModelFacts) -> list[tuple[int, int]]:
    """Input and output width of every matrix of the encoder's layers in use, and of the patch embedding."""
    e = facts.encoder
    layer = [*([(e.width, e.width)] * 4), (e.width, e.intermediate), (e.intermediate, e.width)]
    return [(3 * e.patch * e.patch, e.width), *(layer * e.layers)]


def _encoder_rest(facts: ModelFacts) -> int:
    """Biases, norms, position table and class token."""
    e = facts.encoder
    layer = 4 * e.width + e.intermediate + e.width + 4 * e.width
    return e.layers * layer + (e.tokens if e.merge == 1 else 0) * e.width + e.class_tokens * 3 * e.width


def projector_widths(facts: ModelFacts) -> tuple[int, int, int]:
    """Input, inner and output width of the projector."""
    joined = facts.encoder.width * facts.encoder.merge**2
    return joined, facts.decoder.width if facts.encoder.merge == 1 else joined, facts.decoder.width


def projector_weights(facts: ModelFacts) -> int:
    """Weights of the projector's two linears, biases included."""
    into, inner, out = projector_widths(facts)
    return into * inner + inner + inner * out + out


def decoder_linears(d: DecoderFacts) -> dict[str, tuple[int, int]]:
    """Input and output width of each linear of a layer."""
    widths = {"width": d.width, "query": d.heads * d.head_dim, "key": d.kv_heads * d.head_dim, "inner": d.intermediate}
    return {name: (widths[into], widths[out]) for name, (into, out) in LINEARS.items()}


def _linear_bytes(plan: Plan, part: Literal["encoder", "projector", "decoder", "head"], into: int, out: int, name: str = "") -> int:
    """One linear under the part's scheme: its codes and their scales, one per output, or per output and block of input channels.

    Of codes that the checkpoint brings, zero points are counted wherever config.json allows them.
    """
    scheme, width = plan.quantize.get(part), WIDTHS[plan.dtype]
    if scheme is None or any(k in name for k in scheme.keep):
        return into * out * width
    if scheme.weights in ("fp16", "bf16"):
        return into * out * 2
    if scheme.stored is not None:
        bits, scales = (4 if scheme.weights == "int4" else 8), out * (into // scheme.block if scheme.block else 1)
        return (into * out + (scales if scheme.stored.zero_points else 0)) * bits // 8 + scales * width
    if scheme.weights in ("int8", "fp8"):
        return into * out + out * width
    return -(-into // 2) * out + -(-into // scheme.block) * out * (1 if scheme.weights == "nvfp4" else width)


def layer_bytes(plan: Plan, layer: int) -> int:
    """Bytes of one decoder layer, its two norms included."""
    d = plan.facts.decoder
    linears = sum(_linear_bytes(plan, "decoder", i, o, f"layers.{layer}.{name}") for name, (i, o) in decoder_linears(d).items())
    return linears + 2 * d.width * WIDTHS[plan.dtype]


def head_bytes(plan: Plan) -> int:
    """Bytes of the output head as a graph holds it, whether or not it is the token table."""
    d = plan.facts.decoder
    return _linear_bytes(plan, "head", d.width, d.vocabulary)


def block_bytes(plan: Plan, block: BlockPlan) -> int:
    """Bytes of the weights that one block's graph or engine holds: its layers, and norm and head at the end."""
    tail = head_bytes(plan) + plan.facts.decoder.width * WIDTHS[plan.dtype] if block.head else 0
    return sum(layer_bytes(plan, layer) for layer in range(block.first, block.last)) + tail


def embed_bytes(plan: Plan) -> int:
    """Bytes of the token table, which goes with the head; not in fp8, of which no rows can be looked up."""
    d = plan.facts.decoder
    return d.vocabulary * d.width * WIDTHS[plan.dtype] if _fp8_head(plan) else head_bytes(plan)


def _fp8_head(plan: Plan) -> bool:
    scheme = plan.quantize.get("head")
    return scheme is not None and scheme.weights == "fp8"


def vision_bytes(plan: Plan) -> int:
    """Bytes of encoder and projector (or what replaces it) as one vision graph holds them, and of what its methods have learned."""
    return _encoder_bytes(plan) + _projector_bytes(plan) + _learned_in_vision(plan)


def learned_bytes(plan: Plan, stages: Sequence[StagePlan]) -> int:
    """Bytes of the learned weights that belong to some stages: an entry's, with its first stage."""
    return sum(s.weights.elements * WIDTHS[plan.dtype] for s in stages if s.weights is not None and s.stage.index == 0)


def tower_bytes(plan: Plan, tower: TowerPlan) -> int:
    """Bytes of a text tower: token and position tables, layers with their norms, the final norm and the projection.

    CLIP ViT-L/14's (49408 tokens, 77 places, width 768, inner 3072, 12 layers, to 768) has 123,650,304 weights.
    """
    c, inner = tower.hidden, tower.intermediate
    layer = 4 * (c * c + c) + 2 * c * inner + inner + c + 4 * c
    return ((tower.vocabulary + tower.tokens) * c + tower.layers * layer + 2 * c + c * tower.width) * WIDTHS[plan.dtype]


def _learned_in_vision(plan: Plan) -> int:
    return learned_bytes(plan, plan.vision[0].stages) if plan.vision else 0


def _encoder_bytes(plan: Plan) -> int:
    if not plan.images:
        return 0
    width, wide = plan.facts.encoder.width, WIDTHS[plan.dtype]
    patches, *linears = _encoder_linears(plan.facts)
    rest = _encoder_rest(plan.facts)
    if _looks_ahead_behind(plan):
        linears += [(width, width)] * 2
        rest += 4 * width
    scheme = plan.quantize.get("encoder")
    stored = scheme is not None and (scheme.weights == "int8" or not patch_kernel(plan.facts))
    first = _linear_bytes(plan, "encoder", *patches) if stored else patches[0] * patches[1] * wide
    return first + sum(_linear_bytes(plan, "encoder", into, out) for into, out in linears) + rest * wide


def _looks_ahead_behind(plan: Plan) -> bool:
    """Whether a stage scores with norm, query and key of the first encoder layer not in use."""
    stages = [s for s in plan.vision[0].stages if s.stage.at.part == "encoder" and s.stage.at.layer is None] if plan.vision else []
    return any(looks_ahead(s) for s in stages)


def looks_ahead(stage: StagePlan) -> bool:
    """Whether a stage in the encoder asks for the layer to come."""
    return any(isinstance(n, (Attention, Keys)) and n.layer == "next" for n in stage.stage.needs)


def _projector_bytes(plan: Plan) -> int:
    if not plan.images or any(v.replacing for v in plan.vision):
        return 0
    into, inner, out = projector_widths(plan.facts)
    biases = (inner + out) * WIDTHS[plan.dtype]
    return _linear_bytes(plan, "projector", into, inner) + _linear_bytes(plan, "projector", inner, out) + biases


def cut_bytes(plan: Plan, index: int) -> int:
    """Bytes of what one cut holds: learned weights, and norm, query and key of the layer after it where it scores with that."""
    return _duplicated_bytes(plan, index) + learned_bytes(plan, plan.cuts[index].stages)


def _duplicated_bytes(plan: Plan, index: int) -> int:
    if not plan.cuts[index].attention("next"):
        return 0
    d = plan.facts.decoder
    return (d.width * (d.heads + d.kv_heads) * d.head_dim + d.width) * WIDTHS[plan.dtype]


def weight_bytes(plan: Plan) -> WeightBytes:
    """Reckon the stored bytes of every part."""
    d = plan.facts.decoder
    return WeightBytes(
        encoder=_encoder_bytes(plan),
        projector=_projector_bytes(plan),
        embed=embed_bytes(plan),
        decoder=sum(layer_bytes(plan, layer) for layer in range(d.layers)) + d.width * WIDTHS[plan.dtype],
        head=0 if d.tied and not _fp8_head(plan) else head_bytes(plan),
        cuts=sum(_duplicated_bytes(plan, index) for index in range(len(plan.cuts))),
        methods=_learned_in_vision(plan) + sum(learned_bytes(plan, cut.stages) for cut in plan.cuts),
        towers=sum(tower_bytes(plan, tower) for tower in plan.towers),
    )
