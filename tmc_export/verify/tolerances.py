"""The one table of tolerances: by rung and by the precision of the weights, with the reason beside each number.

An element passes when `|got - want| <= atol + rtol * max|want|`: one scale per tensor, because a small element beside large ones carries
the rounding of the large ones it was summed from. Indices are compared exactly, except where `margin_bound` calls the choice a tie.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tmc_export.core.errors import ParityError

if TYPE_CHECKING:
    from tmc_export.plan.types import Plan

__all__ = [
    "FLOAT16_MAX",
    "MARGINS",
    "TOLERANCES",
    "Precision",
    "Tolerance",
    "coarsest",
    "grade",
    "margin_bound",
    "precision_of",
    "tolerance",
]

Precision = Literal[
    "float32", "float16", "int8 slots", "int8 slots, half", "fp8 slots", "fp8 slots, half", "fp8 slots, bf16", "bf16", "int8", "int8 w8a8",
    "fp8", "fp8 w8a8", "int4", "nvfp4", "nvfp4 w4a4",
]  # fmt: skip

FLOAT16_MAX = 65504.0
"""The largest float16; a tensor above it overflows, one above half of it leaves no room for another input."""


@dataclass(frozen=True)
class Tolerance:
    """What a rung may differ by.

    Attributes:
        rtol: share of the largest magnitude of the expected tensor.
        atol: absolute.
        sqnr_db: least signal-to-quantization-noise ratio.
        kl: most KL divergence of the next-token distribution, in nats.
        same_tokens: greedy tokens must be equal where the two best logits differ by more than the tolerance.
        reason: why these numbers.
    """

    rtol: float
    atol: float
    sqnr_db: float
    kl: float
    same_tokens: bool
    reason: str


TOLERANCES: Mapping[tuple[str, str], Tolerance] = {
    ("eager", "float32"): Tolerance(
        rtol=1e-5, atol=1e-6, sqnr_db=100, kl=1e-8, same_tokens=True,
        reason="same kernels, other order of sums over up to 1e3 terms: sqrt(1e3) * 2^-24 = 2e-6 a layer, over some tens of layers",
    ),
    ("subgraph", "float32"): Tolerance(
        rtol=2e-5, atol=1e-6, sqnr_db=90, kl=1e-8, same_tokens=True,
        reason="a subgraph on the reference's inputs: other matrix kernels; a mask of -3e4 for -inf changes nothing (exp is 0 for both)",
    ),
    ("end_to_end", "float32"): Tolerance(
        rtol=1e-4, atol=1e-5, sqnr_db=80, kl=1e-6, same_tokens=True,
        reason="what subgraphs differ by, run through all layers and every step; norms let it grow about tenfold",
    ),
    ("subgraph", "float16"): Tolerance(
        rtol=1e-2, atol=1e-3, sqnr_db=45, kl=1e-3, same_tokens=False,
        reason="weights and, on a device, activations rounded to 11 bits: 2^-11 = 5e-4 an operation, some twenty in a row",
    ),
    ("end_to_end", "float16"): Tolerance(
        rtol=3e-2, atol=1e-3, sqnr_db=35, kl=1e-2, same_tokens=False,
        reason="the same through all layers; a greedy token may turn where two logits lie that close",
    ),
    ("subgraph", "int8 slots"): Tolerance(
        rtol=2e-2, atol=1e-3, sqnr_db=55, kl=1e-5, same_tokens=False,
        reason="beside float32 the reference rounds to the same codes but for those half-way; a turned one is 1 / 127 of its head's range",
    ),
    ("end_to_end", "int8 slots"): Tolerance(
        rtol=2e-2, atol=1e-3, sqnr_db=50, kl=1e-3, same_tokens=False,
        reason="the same through all layers; below what a cache that does not round is away, some 40 dB",
    ),
    ("subgraph", "int8 slots, half"): Tolerance(
        rtol=3e-2, atol=1e-3, sqnr_db=35, kl=1e-3, same_tokens=False,
        reason="beside float16 rows differ by 2^-11 of themselves, so that some codes in a hundred turn",
    ),
    ("end_to_end", "int8 slots, half"): Tolerance(
        rtol=5e-2, atol=1e-3, sqnr_db=30, kl=1e-2, same_tokens=False,
        reason="float16's end to end, and what turned codes add to it",
    ),
    ("subgraph", "fp8 slots"): Tolerance(
        rtol=5e-2, atol=1e-3, sqnr_db=45, kl=1e-4, same_tokens=False,
        reason="as int8 slots; few codes lie half-way, and a turned one is up to 1 / 14 of its head's range",
    ),
    ("end_to_end", "fp8 slots"): Tolerance(
        rtol=5e-2, atol=1e-3, sqnr_db=42, kl=1e-2, same_tokens=False,
        reason="the same through all layers; below what a cache that does not round is away, 20 to 30 dB",
    ),
    ("subgraph", "fp8 slots, half"): Tolerance(
        rtol=0.13, atol=1e-3, sqnr_db=25, kl=1e-2, same_tokens=False,
        reason="beside float16 rows differ by 2^-11 of themselves, so that some codes in a hundred turn, each by up to 1 / 8 of itself",
    ),
    ("end_to_end", "fp8 slots, half"): Tolerance(
        rtol=0.15, atol=1e-3, sqnr_db=22, kl=3e-2, same_tokens=False,
        reason="float16's end to end, and what turned codes add to it",
    ),
    ("subgraph", "fp8 slots, bf16"): Tolerance(
        rtol=0.13, atol=1e-3, sqnr_db=25, kl=1e-2, same_tokens=False,
        reason="beside bf16 rows differ by 2^-9 of themselves, so that codes turn, each by up to 1 / 8 of itself",
    ),
    ("end_to_end", "fp8 slots, bf16"): Tolerance(
        rtol=0.15, atol=1e-3, sqnr_db=22, kl=0.1, same_tokens=False,
        reason="bf16's end to end, and what turned codes add to it",
    ),
    ("subgraph", "bf16"): Tolerance(
        rtol=5e-2, atol=1e-3, sqnr_db=30, kl=1e-2, same_tokens=False,
        reason="weights rounded to 8 bits: an error of 2^-9 of each, about 56 dB a linear, less over several layers",
    ),
    ("end_to_end", "bf16"): Tolerance(
        rtol=0.1, atol=1e-3, sqnr_db=28, kl=0.1, same_tokens=False,
        reason="the same through all layers; a greedy token may turn where two logits lie that close",
    ),
    ("subgraph", "int8"): Tolerance(
        rtol=0.1, atol=1e-2, sqnr_db=25, kl=0.1, same_tokens=False,
        reason="8 bits a channel: a step of max / 127, about 42 dB a linear with Gaussian weights, less over several layers",
    ),
    ("end_to_end", "int8"): Tolerance(
        rtol=0.2, atol=1e-2, sqnr_db=20, kl=0.3, same_tokens=False,
        reason="the same through all layers; the bound finds a broken graph, what 8 bits cost is measured on a task",
    ),
    ("subgraph", "fp8"): Tolerance(
        rtol=0.25, atol=1e-2, sqnr_db=18, kl=0.5, same_tokens=False,
        reason="4 significant bits of each number: an error of up to 2^-4 of it, about 32 dB a linear, less over several layers",
    ),
    ("end_to_end", "fp8"): Tolerance(
        rtol=0.6, atol=1e-2, sqnr_db=10, kl=1.0, same_tokens=False,
        reason="the same through all layers; the bound finds a broken graph, what fp8 costs is measured on a task",
    ),
    ("subgraph", "int8 w8a8"): Tolerance(
        rtol=0.3, atol=1e-2, sqnr_db=12, kl=1.0, same_tokens=False,
        reason="inputs of products have one step of max / 127 for all channels: where one is large the others keep few bits",
    ),
    ("end_to_end", "int8 w8a8"): Tolerance(
        rtol=0.6, atol=1e-2, sqnr_db=6, kl=2.0, same_tokens=False,
        reason="the same through all layers; the bound finds a broken graph, what it costs is measured on a task",
    ),
    ("subgraph", "fp8 w8a8"): Tolerance(
        rtol=0.4, atol=1e-2, sqnr_db=12, kl=1.0, same_tokens=False,
        reason="4 significant bits of weights and of inputs: about 28 dB a linear, less over several layers",
    ),
    ("end_to_end", "fp8 w8a8"): Tolerance(
        rtol=0.8, atol=1e-2, sqnr_db=6, kl=2.0, same_tokens=False,
        reason="the same through all layers; the bound finds a broken graph, what it costs is measured on a task",
    ),
    ("subgraph", "nvfp4"): Tolerance(
        rtol=0.5, atol=1e-2, sqnr_db=12, kl=1.0, same_tokens=False,
        reason="2 significant bits in blocks of 16: about 21 dB a linear with Gaussian weights, less over several layers",
    ),
    ("end_to_end", "nvfp4"): Tolerance(
        rtol=1.0, atol=1e-2, sqnr_db=6, kl=2.0, same_tokens=False,
        reason="what 4 bits cost is a property of the model: the bound only finds a broken graph; accuracy is measured on a task",
    ),
    ("subgraph", "nvfp4 w4a4"): Tolerance(
        rtol=0.7, atol=1e-2, sqnr_db=9, kl=1.5, same_tokens=False,
        reason="2 significant bits of weights and of inputs, both in blocks of 16: about 18 dB a linear, less over several layers",
    ),
    ("end_to_end", "nvfp4 w4a4"): Tolerance(
        rtol=1.0, atol=1e-2, sqnr_db=4, kl=3.0, same_tokens=False,
        reason="what 4 bits cost is a property of the model: the bound only finds a broken graph; accuracy is measured on a task",
    ),
    ("subgraph", "int4"): Tolerance(
        rtol=0.5, atol=1e-2, sqnr_db=12, kl=1.0, same_tokens=False,
        reason="4 bits in blocks: an error of step / sqrt(12), about 20 dB a linear with Gaussian weights, less over several layers",
    ),
    ("end_to_end", "int4"): Tolerance(
        rtol=1.0, atol=1e-2, sqnr_db=6, kl=2.0, same_tokens=False,
        reason="what 4 bits cost is a property of the model: the bound only finds a broken graph; accuracy is measured on a task",
    ),
}  # fmt: skip

MARGINS: Mapping[str, tuple[float, str]] = {
    "float32": (1e-5, "relative gap of the k-th score: scores differ by up to the eager rung's rtol between two float32 paths"),
    "float16": (1e-2, "scores are float32, but the hidden states they come from carry float16's subgraph rtol"),
    "int8 slots": (1e-2, "scores are of keys of which one may be a step of its head's range off, about a hundredth of that token's score"),
    "int8 slots, half": (2e-2, "the same, and hidden states that carry float16's subgraph rtol"),
    "fp8 slots": (3e-2, "as int8 slots; a number's neighbour is up to 1 / 8 of it away, of the many that a score sums up"),
    "fp8 slots, half": (5e-2, "the same, and hidden states that carry float16's subgraph rtol"),
    "fp8 slots, bf16": (5e-2, "the same, and hidden states that carry weights rounded to 8 bits"),
    "bf16": (2e-2, "hidden states carry a few times the rounding of weights to 8 bits, 2^-9 of each"),
    "int8": (3e-2, "weights differ by their quantization step of max / 127; only choices that are clear beside it are compared"),
    "int8 w8a8": (1e-1, "hidden states carry the steps of every product's input; only choices that are clear beside them are compared"),
    "fp8": (5e-2, "weights differ by up to 2^-4 of each; only choices that are clear beside it are compared"),
    "fp8 w8a8": (1e-1, "weights and inputs differ by up to 2^-4 of each; only choices that are clear beside it are compared"),
    "nvfp4": (1e-1, "weights differ by their quantization step; other tokens may rightly be kept, so only clear choices are compared"),
    "nvfp4 w4a4": (2e-1, "weights and inputs differ by their steps; other tokens may rightly be kept, so only clear choices are compared"),
    "int4": (1e-1, "weights differ by their quantization step; other tokens may rightly be kept, so only clear choices are compared"),
}


_COARSE: tuple[Precision, ...] = ("nvfp4 w4a4", "int4", "nvfp4", "int8 w8a8", "fp8 w8a8", "fp8", "int8", "bf16")
"""From few bits to many; a linear with Gaussian weights keeps some 18, 20 and 21 dB, 28 of both w8a8, 32, 42 and 56."""


def grade(weights: str, activations: str | None) -> str:
    """Name a part's scheme as the tables do.

    >>> grade("int8", "int8"), grade("nvfp4", "nvfp4"), grade("int4", None)
    ('int8 w8a8', 'nvfp4 w4a4', 'int4')
    """
    return weights if activations is None else f"{weights} {'w4a4' if weights == 'nvfp4' else 'w8a8'}"


def precision_of(plan: Plan) -> Precision:
    """Return the row of the tables that a plan's weights and slots belong to: the coarsest scheme of its parts.

    Codes that the checkpoint brings round nothing: the reference computes with what they stand for.
    """
    kv = plan.quantize.get("kv")
    codes = kv.weights if kv is not None and (kv.weights == "int8" or kv.weights == "fp8") else None
    schemes = {grade(s.weights, s.activations) for part, s in plan.quantize.items() if part != "kv" and s.stored is None}
    return coarsest(schemes, plan.dtype, codes)


def coarsest(schemes: Collection[str], dtype: str, codes: Literal["int8", "fp8"] | None = None) -> Precision:
    """Return the row of the tables for some weight schemes beside a base precision, and slots of codes.

    >>> coarsest({"int8", "fp16"}, "float32"), coarsest(set(), "float16"), coarsest(set(), "float32", "fp8")
    ('int8', 'float16', 'fp8 slots')
    >>> [coarsest({weights}, "float32", codes) for weights, codes in (("bf16", "fp8"), ("bf16", "int8"), ("int8", "fp8"))]
    ['fp8 slots, bf16', 'bf16', 'int8']
    """
    found = next((name for name in _COARSE if name in schemes), None)
    if found == "bf16" and codes == "fp8":
        return "fp8 slots, bf16"
    if found is not None:
        return found
    half = "fp16" in schemes or dtype != "float32"
    if codes == "int8":  # the reference rounds to codes, too, so that any weight scheme is coarser; of fp8's, any but bf16
        return "int8 slots, half" if half else "int8 slots"
    if codes == "fp8":
        return "fp8 slots, half" if half else "fp8 slots"
    return "float16" if half else "float32"


def tolerance(rung: str, precision: str) -> Tolerance:
    """Look up a rung's tolerance.

    Raises:
        ParityError: the table has no such entry.
    """
    found = TOLERANCES.get((rung, precision))
    if found is None:
        raise ParityError(f"no tolerance for rung '{rung}' at precision '{precision}'; add one, with its reason, to verify/tolerances.py")
    return found


def margin_bound(precision: str) -> float:
    """Return the relative k-th margin up to which a kept set is a tie.

    Raises:
        ParityError: the table has no such precision.
    """
    if precision not in MARGINS:
        raise ParityError(f"no margin bound for precision '{precision}'; add one, with its reason, to verify/tolerances.py")
    return MARGINS[precision][0]
