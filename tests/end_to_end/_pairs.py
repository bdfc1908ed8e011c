"""Representatives of every site and every kind of layout change, and what becomes of every ordered pair of them; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUILT", "BY_NAME", "CONFIG", "PAIRS", "REFUSED", "REPRESENTATIVES", "Representative", "share_a_site", "write_pair"]

CONFIG = Path(__file__).parents[1] / "plan" / "data" / "small-llava"
"""The JSON files of `save_small_llava(folder)`: 36 visual tokens, 2 encoder layers in use, 4 decoder layers."""


@dataclass(frozen=True)
class Representative:
    """A recipe entry that stands for a site and a kind of layout change.

    Attributes:
        entry: one entry of `compress`.
        sites: where its stages act.
        kind: what it does to the layout.
    """

    entry: str
    sites: str
    kind: str

    @property
    def name(self) -> str:
        """`method`."""
        return self.entry.split("method: ")[1].split(",")[0].rstrip("}")


REPRESENTATIVES = (
    Representative("{at: input, method: downsample, grid: [5, 5]}", "input", "a smaller raster"),
    Representative("{at: encoder.1, method: adaptive_pool, grid: [4, 4]}", "encoder.1", "a smaller raster"),
    Representative(
        "{at: encoder.1, method: mustdrop, window: [2, 2], merge: 1, layers: [1, 2], keep: [75%, 75%]}",
        "encoder.1 encoder decoder.1 decoder.2",
        "merged windows; a state from the encoder to two cuts; truncates",
    ),
    Representative("{at: encoder.1.mid, method: tome, r: 4}", "encoder.1.mid", "merged pairs; a bias on keys"),
    Representative(
        "{at: encoder, method: visionzip, dominant: 9, contextual: 3}", "encoder", "a selection and synthetic tokens; takes the class token"
    ),
    Representative(
        "{at: encoder, method: llava_mini, grid: [3, 3], heads: 4, prefusion: 1, weights: {random: 0}}",
        "encoder decoder.0",
        "grows; at decoder.0 the text is replaced and the picture withdrawn but for 9 tokens",
    ),
    Representative(
        "{at: projector.replace, method: ldp_v2, grid: [3, 3], weights: {random: 0}}",
        "projector.replace",
        "a learned projector, from raster to raster",
    ),
    Representative("{at: projector, method: random, keep: 60%}", "projector", "a selection"),
    Representative(
        "{at: projector, method: victor, registers: 9, layer: 2, weights: {random: 0}}",
        "projector decoder.2",
        "grows; at decoder.2 only registers stay",
    ),
    Representative(
        "{at: projector, method: voco, count: 4, weights: {random: 0}}", "projector", "grows; hides the picture behind a barrier"
    ),
    Representative("{at: decoder.0, method: adafv, keep: 60%}", "encoder decoder.0", "a selection by a state from the encoder; renumbers"),
    Representative(
        "{at: decoder.1, method: pyramiddrop, layers: [1, 2, 3], keep: [75%, 40%, 20%]}",
        "decoder.1 decoder.2 decoder.3",
        "selections at three cuts; renumbers",
    ),
    Representative(
        "{at: decoder.1, method: sparsevlm, layers: [1, 3], keep: [60%, 60%]}",
        "decoder.0 decoder.1 decoder.3",
        "selections and synthetic tokens; a state from cut to cut; truncates",
    ),
    Representative("{at: decoder.2, method: fastv, keep: 60%}", "decoder.2", "a selection"),
    Representative("{at: decoder.2, method: tokencarve, keep: 60%}", "decoder.2", "a selection that prunes the KV of the layers before"),
    Representative("{at: decoder.2, method: vtw}", "decoder.2", "all withdrawn"),
)
"""One at least for each site, and for each kind of change the contract knows."""

BY_NAME = {r.name: r for r in REPRESENTATIVES}
PAIRS = tuple((a.name, b.name) for a in REPRESENTATIVES for b in REPRESENTATIVES)
"""All ordered pairs; the first one stands first in `compress`."""

# What is refused: words of the reason, the entry whose line is named, the other one, and where the blamed one stands in the list:
# "either" place, or "first" or "second", where the rule hangs on the order.
_RULES: tuple[tuple[str, str, str, str], ...] = (
    # tokens that a later stage knows one by one are changed in between
    ("changes them in between", "mustdrop", "random victor voco adafv pyramiddrop sparsevlm", "either"),
    ("changes them in between", "mustdrop", "visionzip", "first"),
    ("changes them in between", "mustdrop", "fastv tokencarve", "second"),
    ("changes them in between", "llava_mini", "random victor voco", "either"),
    ("changes them in between", "llava_mini", "visionzip", "first"),
    ("changes them in between", "victor", "pyramiddrop sparsevlm", "either"),
    ("changes them in between", "victor", "random voco", "first"),
    ("changes them in between", "victor", "fastv tokencarve", "second"),
    ("changes them in between", "adafv", "ldp_v2 llava_mini random victor voco", "either"),
    ("changes them in between", "adafv", "visionzip", "first"),
    ("changes them in between", "adafv", "adafv", "second"),
    ("changes them in between", "victor", "victor", "first"),
    # the raster, or the class token, is gone
    ("does not tile the 5x5 patches", "mustdrop", "downsample", "either"),
    ("needs a raster of visual tokens", "adaptive_pool", "mustdrop", "second"),
    ("needs a raster of visual tokens", "ldp_v2", "mustdrop tome visionzip llava_mini", "either"),
    ("needs a raster of visual tokens", "llava_mini", "mustdrop tome", "either"),
    ("needs a raster of visual tokens", "llava_mini", "visionzip", "second"),
    ("needs a raster of visual tokens", "llava_mini", "llava_mini", "second"),
    ("needs a raster of visual tokens", "mustdrop", "mustdrop", "second"),
    ("lost it to an earlier entry", "mustdrop", "visionzip", "second"),
    ("needs the class token", "adafv", "visionzip", "second"),
    ("needs the class token", "visionzip", "visionzip", "second"),
    # nothing is left, or too little
    ("gets 0 visual tokens: an earlier stage left none", "pyramiddrop", "vtw", "either"),
    ("gets 0 visual tokens: an earlier stage left none", "sparsevlm", "vtw", "either"),
    ("gets 0 visual tokens: an earlier stage left none", "fastv", "vtw", "second"),
    ("gets 0 visual tokens: an earlier stage left none", "mustdrop", "vtw", "second"),
    ("gets 0 visual tokens: an earlier stage left none", "tokencarve", "vtw", "second"),
    ("gets 0 visual tokens: an earlier stage left none", "victor", "vtw", "second"),
    ("gets 0 visual tokens: an earlier stage left none", "vtw", "vtw", "second"),
    # attention and keys of other tokens: from before a cut of the encoder, or on tokens made at the same cut
    ("asks for what an encoder layer computed", "adafv", "tome", "either"),
    ("asks for what an encoder layer computed", "visionzip", "tome", "either"),
    ("asks for what an encoder layer computed", "tome", "tome", "second"),
    ("which no layer has seen", "pyramiddrop", "sparsevlm", "second"),
    ("which no layer has seen", "sparsevlm", "sparsevlm", "second"),
    # one projector, one block of KV rows, one barrier
    ("replaces the projector already", "ldp_v2", "ldp_v2", "second"),
    ("prunes the KV of layers 0 to 1", "tokencarve", "pyramiddrop sparsevlm", "either"),
    ("prunes the KV of layers 0 to 1", "tokencarve", "mustdrop", "second"),
    ("hides the picture from the text", "voco", "pyramiddrop sparsevlm fastv tokencarve vtw", "either"),
    ("is behind the 4 tokens that hide the picture", "random", "voco", "second"),
    ("is behind the 4 tokens that hide the picture", "victor", "voco", "second"),
)


def _refused() -> Iterator[tuple[tuple[str, str], tuple[int, str]]]:
    for words, blamed, others, where in _RULES:
        for other in others.split():
            if where in ("either", "first"):
                yield (blamed, other), (0, words)
            if where in ("either", "second"):
                yield (other, blamed), (1, words)


REFUSED: dict[tuple[str, str], tuple[int, str]] = dict(_refused())
"""Pair -> the entry whose line is named (0 or 1), and words of the reason. All other pairs can be built."""


def write_pair(folder: Path, *names: str) -> Path:
    """Write the recipe of some representatives; entries stand on lines 6, 7, ..."""
    entries = [f"  - {BY_NAME[name].entry}" for name in names]
    head = ["recipe: 1", "name: pair", "model: {source: ./model, dtype: float32}", "inputs: {images: 1, text_tokens: 32, new_tokens: 8}"]
    path = folder / "pair.yaml"
    path.write_text("\n".join([*head, "compress:", *entries, "target: {device: cpu, runtime: onnxruntime}", ""]), "utf-8")
    return path


def share_a_site(first: str, second: str) -> bool:
    """Say whether two representatives meet at a site; only then does the order of the list matter."""
    return bool(set(BY_NAME[first].sites.split()) & set(BY_NAME[second].sites.split()))


BUILT = tuple(
    (a, b) for number, (a, b) in enumerate(PAIRS) if (a, b) not in REFUSED and (share_a_site(a, b) or number <= PAIRS.index((b, a)))
)
"""Pairs to build: where the order cannot matter, one of the two orders."""
