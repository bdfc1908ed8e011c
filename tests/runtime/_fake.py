"""A small decoder twice: as static graphs in numpy behind the runtime's `Backend`, and as plain Python over lists.

A layer: `K = h + position / 100 + layer`, `V = h`, `h' = h / 2 + mean(V) / 4 + mean(K) / 20` over the visible keys. A cut keeps, per
picture, the candidates whose keys in the layer before have the largest sums; it may prune the KV of earlier layers and renumber.
The graphs see padding, slots and masks; the plain form knows none of them. Every quantity depends on everything before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tmc_export.bundle.program import BlockProgram, CutProgram, GraphPhase, Program, VisionProgram
from tmc_export.runtime._backend import Outputs
from tmc_export.runtime._host import HostMemory

Array = NDArray[Any]
WIDTH, VOCABULARY = 4, 16
HEAD = np.random.default_rng(7).standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
TABLE = np.random.default_rng(8).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)


@dataclass(frozen=True)
class CutSpec:
    """A cut of the fake: what stays of a picture, what becomes of positions, and earlier layers whose KV it prunes."""

    layer: int
    keep: int
    positions: Literal["keep", "renumber"] = "keep"
    kv: tuple[int, ...] = ()


def make_program(
    cuts: Sequence[CutSpec] = (), *, layers: int = 4, images: int = 1, visual: int = 6, text: int = 8, new: int = 6, chunk: int = 4,
    splits: Sequence[int] = (),
) -> Program:  # fmt: skip
    """The program of a bundle with these cuts."""
    by_layer = {c.layer: c for c in cuts}
    edges = [0, *sorted({*by_layer, *splits} - {0}), layers]
    blocks: list[BlockProgram] = []
    made: list[CutProgram] = []
    each = visual
    for index, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        if (cut := by_layer.get(first)) is not None:
            previous = first > 0
            made.append(
                CutProgram(
                    before_block=index, layer=first, file=f"compress_{index}", tokens_in=images * each + text,
                    tokens_out=images * cut.keep + text, visual_in=images * each, visual_out=images * cut.keep, positions=cut.positions,
                    previous=previous, next=False, kv=cut.kv, methods=("fake",),
                )
            )  # fmt: skip
            each = cut.keep
            if previous:
                blocks[-1] = blocks[-1].model_copy(update={"query_rows": {first - 1: "all"}})
        tokens = images * each + text
        phases = {
            "prefill": GraphPhase(file=f"block_{index}_prefill", tokens=tokens),
            "chunk": GraphPhase(file=f"block_{index}_chunk", tokens=chunk, past=tokens + new),
            "decode": GraphPhase(file=f"block_{index}_decode", tokens=1, past=tokens + new),
        }
        blocks.append(
            BlockProgram(
                index=index, first=first, last=last, tokens=tokens, capacity=tokens + new, head=last == layers, phases=phases  # type: ignore[arg-type]
            )
        )  # fmt: skip
    sizes = {"prefill": images * visual + text, "chunk": chunk, "decode": 1}
    return Program(
        family="llava", dtype="float32", batch=1, images=images, width=WIDTH, vocabulary=VOCABULARY, heads=1, kv_heads=1, head_dim=WIDTH,
        rope_axes=1, position_rule="sequential", text_tokens=text, new_tokens=new, chunk=chunk, turns="freeze", image_token=1,
        image_text="<image>", eos=(2,),
        vision=(VisionProgram(file="vision_0", tokens=visual, full_grid=(1, visual), grid=None, stages=(), rule={}),),
        embed={k: GraphPhase(file=f"embed_{k}", tokens=t) for k, t in sizes.items()},  # type: ignore[misc]
        blocks=tuple(blocks), cuts=tuple(made),
    )  # fmt: skip


def _layer(hidden: Array, key: Array, value: Array, visible: Array) -> Array:
    share = visible / np.maximum(visible.sum(1, keepdims=True), 1)
    return (hidden / 2 + share @ value / 4 + share @ key / 20).astype(np.float32)


@dataclass
class FakeGraph:
    """One static graph; refuses inputs of another shape than it was built for, as a real one does."""

    backend: FakeBackend
    file: str
    inputs: tuple[str, ...] = ()

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        self.backend.ran.append(self.file)
        if self.file == self.backend.fail_at:
            raise KeyboardInterrupt
        kind, _, rest = self.file.partition("_")
        if kind == "embed":
            return {"hidden": TABLE[self._shaped(feed["input_ids"], 1, self.backend.program.embed[rest].tokens)]}  # type: ignore[index]
        if kind == "block":
            index, _, phase = rest.partition("_")
            return self._block(self.backend.program.blocks[int(index)], phase, feed)
        cut = self.backend.program.cut_before(int(rest))
        assert cut is not None
        return self._cut(cut, feed)

    def relay(self, feed: Mapping[str, Array], fetch: Collection[str]) -> Outputs:
        found = self.run(feed)
        return Outputs({name: found[name] for name in fetch}, found)

    def step(self, feed: Mapping[str, Array], fetch: Collection[str]) -> Outputs:
        return self.relay(feed, fetch)

    def _shaped(self, array: Array, *shape: int) -> Array:
        assert array.shape == shape, f"{self.file}: got {array.shape}, built for {shape}"
        return array

    def _block(self, block: BlockProgram, phase: str, feed: Mapping[str, Array]) -> dict[str, Array]:
        spec = block.phases[phase]  # type: ignore[index]
        size, past = spec.tokens, spec.past
        hidden = self._shaped(feed["hidden"], 1, size, WIDTH)[0]
        position = self._shaped(feed["positions"], 1, 1, size)[0, 0]
        order, valid = self._shaped(feed["order"], 1, size)[0], self._shaped(feed["valid"], 1, size)[0]
        orders = np.concatenate([self._shaped(feed["past_order"], 1, block.capacity)[0][:past], order])
        alive = np.concatenate([feed["past_valid"][0][:past], valid])
        visible = (order[:, None] >= orders[None]) & alive[None]
        out: dict[str, Array] = {}
        for layer in range(block.first, block.last):
            key, value = (hidden + position[:, None] / 100 + layer).astype(np.float32), hidden
            old = [feed[f"past_key_values.{layer}.{kind}"][0, 0][:past] for kind in ("key", "value")]
            if layer in block.query_rows:
                out[f"query.{layer}"] = hidden[None, None]
            out[f"present.{layer}.key"], out[f"present.{layer}.value"] = key[None, None], value[None, None]
            hidden = _layer(hidden, np.concatenate([old[0], key]), np.concatenate([old[1], value]), visible)
        last = int(self._shaped(feed["last"], 1)[0])
        return {**out, "logits": (hidden[last] @ HEAD)[None]} if block.head else {**out, "hidden_out": hidden[None]}

    def _cut(self, cut: CutProgram, feed: Mapping[str, Array]) -> dict[str, Array]:
        size, images = cut.tokens_in, self.backend.program.images
        hidden = self._shaped(feed["hidden"], 1, size, WIDTH)[0]
        valid, group = self._shaped(feed["valid"], 1, size)[0], self._shaped(feed["group"], 1, size)[0]
        places = self._shaped(feed["candidates"], 1, cut.visual_in)[0]
        alive = self._shaped(feed["candidate_valid"], 1, cut.visual_in)[0]
        if cut.previous:
            query = self._shaped(feed[f"query.{cut.layer - 1}"], 1, 1, size, WIDTH)[0, 0]
            assert np.isfinite(query).all()
            scores = feed[f"key.{cut.layer - 1}"][0, 0][self._shaped(feed["slots"], 1, size)[0]].sum(1)
        else:
            scores = hidden.sum(1)
        each, keep = cut.visual_in // images, cut.visual_out // images
        kept = np.full((images, keep), -1)
        for picture in range(images):
            mine = [n for n in range(picture * each, (picture + 1) * each) if alive[n]]
            best = sorted(sorted(mine, key=lambda n: (-scores[places[n]], n))[:keep])
            kept[picture, : len(best)] = best
        stays = valid & (group == 0)
        stays[places[kept[kept >= 0]]] = True
        source = np.flatnonzero(stays)[: cut.tokens_out]
        out = np.zeros((cut.tokens_out, WIDTH), np.float32)
        out[: len(source)] = hidden[source]
        padded = np.full(cut.tokens_out, size - 1)
        padded[: len(source)] = source
        alive = np.arange(cut.tokens_out) < len(source)
        found = {"hidden_out": out[None], "source": padded[None], "place": padded[None], "valid_out": alive[None]}
        return {**found, "kept.0": kept.reshape(1, -1), **{f"kv.{layer}": stays[None] for layer in cut.kv}}


@dataclass
class FakeBackend(HostMemory):
    """Opens fake graphs and writes down which ran; `fail_at` names one that is interrupted."""

    program: Program
    name: str = "fake"
    ran: list[str] = field(default_factory=list)
    fail_at: str = ""

    def graph(self, file: str) -> FakeGraph:
        return FakeGraph(self, file)


@dataclass
class Plain:
    """The same decoder without buckets, slots, chunks or masks."""

    cuts: Sequence[CutSpec] = ()
    layers: int = 4
    cache: list[list[tuple[Array, Array, int]]] = field(default_factory=list)
    following: dict[int, int] = field(default_factory=dict)
    length: int = 0

    def feed(self, hidden: Array, group: Sequence[int], select: bool = True) -> Array:
        """Take tokens; returns the logits of the last."""
        self.cache = self.cache or [[] for _ in range(self.layers)]
        rows = [hidden[i].astype(np.float32) for i in range(len(group))]
        groups, orders = list(group), [self.length + i for i in range(len(group))]
        self.length += len(group)
        positions = self._count_on(-1, len(rows))
        by_layer = {c.layer: c for c in self.cuts}
        for layer in range(self.layers):
            if (cut := by_layer.get(layer)) is not None:
                if select and any(groups):
                    turn = {order: key for key, _, order in self.cache[layer - 1]} if layer else {}
                    score = [float(turn[o].sum()) if layer else float(rows[i].sum()) for i, o in enumerate(orders)]
                    stays = [i for i, g in enumerate(groups) if g == 0]
                    for picture in sorted(set(groups) - {0}):
                        mine = [i for i, g in enumerate(groups) if g == picture]
                        stays += sorted(mine, key=lambda i: (-score[i], i))[: cut.keep]
                    gone = {o for i, o in enumerate(orders) if i not in stays}
                    rows, groups, orders, positions = ([x[i] for i in sorted(stays)] for x in (rows, groups, orders, positions))
                    for pruned in cut.kv:
                        self.cache[pruned] = [entry for entry in self.cache[pruned] if entry[2] not in gone]
                if cut.positions == "renumber":
                    positions = self._count_on(layer, len(rows))
            new = []
            for row, position, order in zip(rows, positions, orders, strict=True):
                self.cache[layer].append(((row + position / 100 + layer).astype(np.float32), row, order))
                seen = [e for e in self.cache[layer] if e[2] <= order]
                key, value = np.mean([e[0] for e in seen], 0), np.mean([e[1] for e in seen], 0)
                new.append((row / 2 + value / 4 + key / 20).astype(np.float32))
            rows = new
        return np.asarray(rows[-1] @ HEAD)

    def _count_on(self, place: int, count: int) -> list[int]:
        start = self.following.get(place, 0)
        self.following[place] = start + count
        return list(range(start, start + count))
