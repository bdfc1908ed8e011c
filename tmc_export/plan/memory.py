"""Memory of a plan on its device while it runs; `plan.building` has what building its engines takes.

onnxruntime keeps a packed copy of a block's weights per session, and one session per phase: three copies. Measured (1.31, CPU, three
sessions): 778 MiB for 256 of float32, 779 for 128 of float16, which every session turns into float32. Under `memory_tight` floating-point
weights stay in the file's pages, which are mapped once, and float16 is turned into float32 one weight at a time by each run. Sessions with
codes take turns, one phase at a time; beside int4 and int8 codes of weights alone onnxruntime keeps their sums. Nothing is kept between
runs, nor the token table. `benchmarks/memory_tight.py` measures it; the process itself (Python, onnxruntime: about 70 MB) is not reckoned.
TensorRT engines of decode width 1 store float16 weights, and codes that meet codes of activations, twice; of width 2 all once. Codes of
weights alone are stored once at width 1, too (`benchmarks/decode_width.py`); a width of 1 is reckoned with two copies of all nevertheless.
"""

from __future__ import annotations

from dataclasses import dataclass

from tmc_export.core.errors import LegalityError
from tmc_export.plan._flops import vision_tokens
from tmc_export.plan._launches import kv_bytes
from tmc_export.plan._weights import WIDTHS, block_bytes, cut_bytes, decoder_linears, embed_bytes, tower_bytes, vision_bytes, widened
from tmc_export.plan.rows import ROW_BLOCK, handed_rows
from tmc_export.plan.types import BlockPlan, CutPlan, Plan, TowerPlan, VisionPlan
from tmc_export.recipe import Device, Recipe

__all__ = [
    "GIB",
    "Room",
    "RunMemory",
    "brought",
    "check_run_memory",
    "codes_of",
    "gib",
    "holds_float16",
    "room_of",
    "run_memory",
    "shared_in_place",
]

GIB = 2**30
_RESERVE_SHARED, _RESERVE_SHARE, _RESERVE_OWN = 1 * GIB, 0.06, GIB // 2


@dataclass(frozen=True)
class Room:
    """Memory that a plan may take on a device, or engines on the machine that builds them, bytes.

    Attributes:
        total: of the device.
        reserve: left to others; an assumption: where CPU and GPU share the memory 1 GiB for the system and 6 % for firmware carve-outs,
            else 0.5 GiB; 2 GiB where engines are built for another device.
        unverified: the total was not read in a document of the maker.
    """

    total: int
    reserve: int
    unverified: bool

    @property
    def free(self) -> int:
        """What is left for graphs."""
        return self.total - self.reserve

    def __str__(self) -> str:
        source = ", unverified" if self.unverified else ""
        return f"{gib(self.free)} ({gib(self.total)}{source}, less {gib(self.reserve)} for the system)"


@dataclass(frozen=True)
class RunMemory:
    """Memory while a conversation runs, bytes.

    Attributes:
        weights: of all sessions or engines.
        kv: static slots.
        activations: of all sessions or engines; each keeps its own.
        copies: how often the decoder's weights are in memory.
    """

    weights: int
    kv: int
    activations: int
    copies: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.activations


def gib(size: float) -> str:
    """`"1.5 GiB"`; below 0.1 GiB in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def room_of(device: Device, runtime: str) -> Room | None:
    """Return the memory that a runtime's graphs share on a device; None when the device file does not know it.

    onnxruntime runs in the memory of the CPU, which a device file knows only where it is shared.
    """
    if device.memory_gib.value is None or (runtime == "onnxruntime" and not device.memory_shared):
        return None
    total = int(device.memory_gib.value * GIB)
    reserve = _RESERVE_SHARED + int(_RESERVE_SHARE * total) if device.memory_shared else _RESERVE_OWN
    return Room(total, reserve, device.memory_gib.unverified)


# ------------------------------------------------------------------------------------------------------------- running
def run_memory(plan: Plan, runtime: str, memory_tight: bool = False) -> RunMemory:
    """Reckon what a loaded bundle takes when every graph has run once."""
    ort, table = runtime == "onnxruntime", embed_bytes(plan)  # of the token table rows are widened
    tight = ort and memory_tight
    copies = (1 if tight else 3) if ort else (2 if plan.decode_width == 1 else 1)
    if not tight:
        plan = widened(plan)
    unpacked = 2 if ort and plan.dtype != "float32" and not tight else 1  # the CPU provider computes float16 in float32
    blocks = sum(_packed(plan, block, unpacked) for block in plan.blocks)
    others = len(plan.vision) * vision_bytes(plan) + sum(cut_bytes(plan, i) for i in range(len(plan.cuts)))
    others += sum(tower_bytes(plan, t) for t in plan.towers)
    acts = sum(vision_activations(plan, v, ort) for v in plan.vision) + sum(_cut_activations(plan, c) for c in plan.cuts)
    acts += sum(_tower_activations(plan, t, ort) for t in plan.towers)
    for block in plan.blocks:
        width = 1 if ort else plan.decode_width
        phases = [
            block_activations(plan, block, t, p, ort) for t, p in ((block.tokens, 0), (plan.chunk, block.capacity), (width, block.capacity))
        ]
        acts += sum(phases) if ort and not tight else max(phases)
    blocks += sum(_sums(plan, block, tight) for block in plan.blocks) if ort else 0
    weights = copies * blocks + unpacked * others + (_widened(plan) if tight else table)
    return RunMemory(weights, sum(kv_bytes(plan, b) for b in plan.blocks), plan.batch * acts, copies)


def shared_in_place(plan: Plan) -> bool:
    """Whether onnxruntime's sessions can share the decoder's weights under `memory_tight`: only as they are in the file, without codes."""
    return codes_of(plan, "decoder") is None


def _widened(plan: Plan) -> int:
    """The largest weight in float32, where it is float16 in the file."""
    d = plan.facts.decoder
    return 4 * d.width * max(d.vocabulary, d.intermediate) if holds_float16(plan) else 0


def holds_float16(plan: Plan) -> bool:
    """Whether weights of the decoder or its head are float16 in the file."""
    schemes = [plan.quantize.get(part) for part in ("decoder", "head")]
    return plan.dtype != "float32" or any(scheme is not None and scheme.weights == "fp16" for scheme in schemes)


def _packed(plan: Plan, block: BlockPlan, unpacked: int) -> int:
    """A block's weights as onnxruntime packs them: codes stay codes, float16 becomes float32."""
    if unpacked == 1 or codes_of(plan, "decoder") is None:
        return unpacked * block_bytes(plan, block)
    tail = block_bytes(plan, block) - block_bytes(plan, _headless(block))
    return block_bytes(plan, _headless(block)) + unpacked * tail


def _sums(plan: Plan, block: BlockPlan, tight: bool) -> int:
    """What onnxruntime's `MatMulNBits` keeps beside codes: a float32 sum per run of codes; of int8 the scale of each run, too.

    It cuts int8 codes into runs itself: of 32, under `memory_tight` of 128.
    """
    scheme = plan.quantize.get("decoder")
    if scheme is None or scheme.activations is not None or scheme.weights not in ("int4", "int8"):
        return 0
    runs, each = (scheme.block or 32, 4) if scheme.weights == "int4" else (128 if tight else 32, 8)
    return (block.last - block.first) * each * sum(-(-into // runs) * out for into, out in decoder_linears(plan.facts.decoder).values())


def _headless(block: BlockPlan) -> BlockPlan:
    return BlockPlan(block.index, block.first, block.last, block.tokens, block.visual_tokens, block.capacity)


def codes_of(plan: Plan, part: str) -> str | None:
    """Return the scheme of a part that is stored as codes with scales; None for floating point as it is."""
    scheme = plan.quantize.get(part)
    return scheme.weights if scheme is not None and scheme.weights not in ("fp16", "bf16") else None


def brought(plan: Plan) -> bool:
    """Say whether the checkpoint brings the decoder's codes, so that a recipe cannot ask for others."""
    scheme = plan.quantize.get("decoder")
    return scheme is not None and scheme.stored is not None


def _wide(plan: Plan, ort: bool) -> int:
    return 4 if ort else WIDTHS[plan.dtype]


def block_activations(plan: Plan, block: BlockPlan, new: int, past: int, ort: bool) -> int:
    """Peak of one phase: residual stream, the larger half of a layer, mask, logits, and the new keys and values of all layers.

    onnxruntime holds the scores of all heads twice (before and after softmax); TensorRT fuses them away, except in float32.
    """
    d, keys = plan.facts.decoder, past + new
    query, key = d.heads * d.head_dim, d.kv_heads * d.head_dim
    attention = 2 * new * query + 2 * keys * key + 2 * keys * query
    if ort or plan.dtype == "float32":
        attention += 2 * d.heads * new * keys
    kv = plan.quantize.get("kv")
    if ort and kv is not None and kv.weights == "fp8":
        attention += 2 * past * key  # widened before the new rows are put behind them; int8 codes are widened together
    numbers = 2 * new * d.width + max(attention, 3 * new * d.intermediate) + 2 * new * key * (block.last - block.first)
    numbers += d.vocabulary + d.width if block.head else 0
    mask = new * keys * (8 + 1 + _wide(plan, ort))  # int64 distances, what is visible, and the mask that is added
    return numbers * _wide(plan, ort) + mask


def vision_activations(plan: Plan, vision: VisionPlan, ort: bool) -> int:
    """Peak of one picture's encoder layer, projector output included."""
    e, tokens = vision.facts.encoder, vision_tokens(vision)
    scores = 2 * e.heads if ort or plan.dtype == "float32" else 0
    layer = max(max(4 * t.attention * e.width + scores * t.attention**2, 2 * t.feed_forward * e.intermediate) for t in tokens.layers)
    projected = max(tokens.projected // e.merge**2, vision.tokens)
    numbers = 2 * e.tokens * e.width + layer + projected * plan.facts.decoder.width
    return numbers * _wide(plan, ort)


def _tower_activations(plan: Plan, tower: TowerPlan, ort: bool) -> int:
    n = tower.tokens
    layer = max(4 * n * tower.hidden + 2 * tower.heads * n * n, 2 * n * tower.intermediate)
    return (2 * n * tower.hidden + layer) * _wide(plan, ort)


def _cut_activations(plan: Plan, cut: CutPlan) -> int:
    d = plan.facts.decoder
    hidden = (cut.tokens_in + cut.tokens_out) * d.width * 4
    keys = plan.blocks[cut.before_block - 1].capacity if cut.scored("previous") else 0
    ahead = plan.blocks[cut.before_block].capacity + cut.tokens_in if cut.attention("next") else 0
    many = any(handed_rows(cut.scored(layer)) == "all" for layer in ("previous", "next"))
    # of a block of rows: products, weights and joined heads; and the query rows of the whole turn
    rows = 4 * d.heads * (3 * min(ROW_BLOCK, cut.tokens_in) * max(keys, ahead) + cut.tokens_in * d.head_dim) if many else 0
    return hidden + 2 * (keys + ahead) * d.heads * d.head_dim * 4 + rows + 9 * cut.tokens_in * cut.tokens_out


def check_run_memory(plan: Plan, recipe: Recipe, room: Room, device: Device) -> RunMemory:
    """Refuse a plan that does not fit its device when it runs.

    Raises:
        LegalityError: with the figures and what helps.
    """
    found = run_memory(plan, recipe.target.runtime, recipe.target.memory_tight)
    if found.total <= room.free:
        return found
    helps = []
    if recipe.target.runtime == "onnxruntime" and not recipe.target.memory_tight:
        helps.append("set target.memory_tight: true")
    if recipe.target.runtime != "onnxruntime" and plan.decode_width == 1:
        helps.append("set target.decode_width: 2, which stores the weights once")
    if codes_of(plan, "decoder") not in ("int4", "nvfp4") and not brought(plan):
        helps.append("write quantize: {decoder: {weights: int4, block: 128}}")
    if found.kv + found.activations > found.total // 4:
        helps.append("lower inputs.images, inputs.text_tokens or inputs.new_tokens, or compress more")
    helps.append("choose a smaller model or a device with more memory")
    times = f" ({found.copies} copies of the decoder's)" if found.copies > 1 else ""
    raise LegalityError(
        f"{recipe.origin(('target', 'device'))}: running needs about {gib(found.total)}: weights {gib(found.weights)}{times}, "
        f"KV {gib(found.kv)}, activations {gib(found.activations)}; '{device.name}' has {room}; {'; or '.join(helps)}"
    )
