"""The decoder of a bundle: blocks and cuts in order, for a whole turn or for one token.

Legend: n tokens of the turn, S a prompt's bucket, C slots, r rotary axes, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tmc_export.bundle.program import CutProgram, Program
from tmc_export.core.errors import BundleError, RuntimeInputError
from tmc_export.runtime._backend import Backend, Graph, Held, Outputs, Rows
from tmc_export.runtime._barrier import since_of
from tmc_export.runtime._flow import Flow
from tmc_export.runtime._host import HostRows
from tmc_export.runtime._slots import BlockSlots
from tmc_export.runtime._step_row import StepRow, cells
from tmc_export.runtime._sums import columns_of_turn, pad_columns, sum_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Decoder", "Mark", "Route", "TurnTrace"]

Route = Literal["auto", "whole", "chunked"]


@dataclass
class TurnTrace:
    """What a turn did.

    Attributes:
        logits: float `[vocabulary]` of the last token.
        kept: (block, stage) → int64 `[m·k]`, place among the candidates that arrived, -1 = none, -2 = a synthetic token.
        visual: visual tokens of the turn that left each cut.
        route: which graphs ran.
    """

    logits: Array
    kept: dict[tuple[int, int], Array] = field(default_factory=dict)
    visual: list[int] = field(default_factory=list)
    route: str = ""


@dataclass(frozen=True)
class Mark:
    """A place in a conversation that it can be taken back to.

    Attributes:
        slots: per block, slots filled and next position.
        length: tokens fed.
        since: first place that the next token sees.
    """

    slots: tuple[tuple[int, int], ...]
    length: int
    since: int = 0


class Decoder:
    """Blocks, cuts and KV slots of one conversation.

    Args:
        program: from the manifest.
        backend: opens the graphs.
    """

    def __init__(self, program: Program, backend: Backend) -> None:
        self.program, self._backend = program, backend
        self.slots = [BlockSlots(block, program, backend) for block in program.blocks]
        self.length = self.since = 0
        self._token = np.zeros((1, 1), np.int64)
        self._token_cell = cells(self._token)
        self._step_rows = [StepRow(program.rope_axes) for _ in self.slots]
        self._feeds: list[dict[str, Held]] = [{**r.arrays, **slots.feed()} for r, slots in zip(self._step_rows, self.slots, strict=True)]

    def reset(self) -> None:
        """Start a new conversation."""
        for slots in self.slots:
            slots.reset()
        self.length = self.since = 0

    def mark(self) -> Mark:
        """Remember where the conversation stands."""
        return Mark(tuple((s.used, s.next_position) for s in self.slots), self.length, self.since)

    def rewind(self, mark: Mark) -> None:
        """Take the conversation back to a mark: what was fed since is forgotten."""
        for slots, (used, following) in zip(self.slots, mark.slots, strict=True):
            slots.forget(used, following)
        self.length, self.since = mark.length, mark.since

    @property
    def next_position(self) -> int:
        """Rotary position of the next token before the first cut."""
        return self.slots[0].next_position

    def room(self) -> int:
        """Tokens that may still be generated before a block is full."""
        return min(s.block.capacity - s.used for s in self.slots)

    def graphs(self, phases: tuple[Literal["prefill", "chunk", "decode"], ...] = ("prefill", "decode")) -> None:
        """Load graphs ahead of their first use; where memory is tight they are loaded at it, because phases may take turns in it."""
        if self.program.memory_tight:
            return
        for phase in phases:
            self._backend.graph(self.program.embed[phase].file)
            for block in self.program.blocks:
                self._backend.graph(block.phases[phase].file)
        for cut in self.program.cuts:
            self._backend.graph(cut.file)

    # ---------------------------------------------------------------------------------------------------- embedding
    def embed(self, ids: Array) -> Array:
        """Look up tokens: int64 `[n]` → `[n, c]`."""
        rows = []
        phase: Literal["prefill", "chunk"] = "prefill" if ids.shape[0] > self.program.embed["chunk"].tokens else "chunk"
        spec = self.program.embed[phase]
        for start in range(0, ids.shape[0], spec.tokens):
            part = ids[start : start + spec.tokens]
            out = self._backend.graph(spec.file).run({"input_ids": _pad(part, spec.tokens)[None]})["hidden"]
            rows.append(out[0, : part.shape[0]])
        return np.concatenate(rows) if rows else np.zeros((0, self.program.width), self.program.dtype)

    # ---------------------------------------------------------------------------------------------------------- turn
    def turn(
        self,
        hidden: Array,
        positions: Array,
        group: Array,
        next_position: int,
        route: Route = "auto",
        states: Mapping[str, Array] | None = None,
    ) -> TurnTrace:
        """Take a whole turn.

        Args:
            hidden: `[n, c]`, visual tokens in place.
            positions: int64 `[r, n]`.
            group: int `[n]`, 0 for text, i + 1 for picture i of this turn.
            next_position: position of the token after the turn.
            route: `whole` runs the prefill graphs on the bucket, `chunked` the chunk graphs; `auto` takes the cheaper that applies.
            states: what vision graphs and text towers hand to cuts, of all pictures: `past_state.<entry>.<name>` → `[m, …]`, and
                `text.<n>` → `[m, width]`.

        Raises:
            RuntimeInputError: the turn does not fit; the conversation is as it was.
        """
        mark = self.mark()
        try:
            order = self.length + np.arange(hidden.shape[0])
            rows = HostRows.of(hidden.astype(self.program.dtype)[None], 1)
            flow = Flow(rows, positions, order, group, next_position, dict(states or {}))
            return self._turn(flow, route)
        except BaseException:  # an interrupt, too, leaves no half-written turn behind
            self.rewind(mark)
            raise

    def _turn(self, flow: Flow, route: Route) -> TurnTrace:
        count, pictures, chosen = flow.count, flow.pictures, self._route(flow, route)
        for index, slots in enumerate(self.slots):  # before anything is computed: up to the first cut the count is known
            if pictures and self.program.cut_before(index) is not None:
                break
            slots.check_room(flow.count)
        trace = TurnTrace(np.zeros(0), route=chosen)
        starts = [slots.used for slots in self.slots]
        flow.since, following = since_of(flow.group, flow.order, self.program.barrier, self.since)
        queries: dict[str, Rows] = {}
        for index, slots in enumerate(self.slots):
            if (cut := self.program.cut_before(index)) is not None:
                arrived = flow.positions
                if pictures:
                    flow = self._cut(cut, flow, queries, starts, trace)
                if cut.positions == "renumber":
                    flow.renumber(slots.next_position)
                elif cut.positions == "truncate":
                    flow.truncate(arrived)
            slots.check_room(flow.count)
            queries = self._block(slots, flow, chosen, trace)
            slots.next_position = flow.next_position
        if following > self.since:  # no later token sees these rows; those of earlier turns stay, so that the turn can be taken back
            for slots, start in zip(self.slots, starts, strict=True):
                slots.compact(start, slots.order[0, start : slots.used] >= following)
            self.since = following
        self.length += count
        return trace

    def _route(self, flow: Flow, route: Route) -> str:
        """Choose the graphs. A prefill graph sees no past, so that every block must take the turn in one piece."""
        first = self.program.cut_before(0)
        bucket = self.program.blocks[0].tokens if first is None else first.tokens_in
        if flow.pictures and flow.count > bucket:
            raise RuntimeInputError(
                f"the prompt has {flow.count} tokens, the bucket holds {bucket} "
                f"({self.program.images} pictures and {self.program.text_tokens} text tokens); "
                "shorten it, or build with a larger inputs.text_tokens"
            )
        empty = all(s.used == 0 for s in self.slots)
        most = bucket if flow.pictures else min(b.tokens for b in self.program.blocks)  # without pictures no cut shortens the turn
        if route == "whole" and not (empty and flow.count <= most):
            why = "the conversation has begun" if not empty else f"{flow.count} tokens exceed the bucket of {most}"
            raise RuntimeInputError(f"route 'whole' does not apply: {why}; use 'auto' or 'chunked'")
        if route == "auto":
            return "whole" if empty and self.program.chunk < flow.count <= most else "chunked"
        return route

    def _block(self, slots: BlockSlots, flow: Flow, route: str, trace: TurnTrace) -> dict[str, Rows]:
        """Run one block over the flow; returns its query rows: all of the turn's, or the last. Its sums over rows are the flow's."""
        block = slots.block
        spec = block.phases["prefill" if route == "whole" else "chunk"]
        graph, step, most = self._backend.graph(spec.file), spec.tokens, max(block.tokens, block.capacity)
        hidden, queries = self._backend.rows(f"block_{block.index}.hidden_out", most, 1), dict[str, Rows]()
        for start in range(0, flow.count, step):
            piece = slice(start, min(start + step, flow.count))
            out = self._run(graph, slots, flow, piece, step)
            for layer, rows in block.query_rows.items():
                name = f"query.{layer}"
                if start == 0 or rows == "last":
                    queries[name] = self._backend.rows(f"block_{block.index}.{name}", most if rows == "all" else 1, 2)
                queries[name].put(out.held[name], start if rows == "all" else 0, piece.stop - start if rows == "all" else 1)
            for name in sum_names(block):
                columns = columns_of_turn(out.arrays[name], spec.past, slots.used - piece.stop, flow.count, piece)
                flow.sums[name] = flow.sums[name] + columns if name in flow.sums else columns
            if block.head and piece.stop == flow.count:
                trace.logits = out.arrays["logits"][0].astype(np.float32)
            elif not block.head:
                hidden.put(out.held["hidden_out"], start, piece.stop - start)
        flow.hidden = hidden
        return queries

    def _run(self, graph: Graph, slots: BlockSlots, flow: Flow, piece: slice, width: int) -> Outputs:
        count = piece.stop - piece.start
        order = flow.order[piece]
        feed: dict[str, Held] = {
            "hidden": flow.hidden.piece(piece.start, piece.stop, width),
            "positions": _pad(flow.positions[:, piece].T, width).T[:, None].copy(),
            "order": _pad(order, width, -1)[None],
            "valid": (np.arange(width) < count)[None],
            "text": _pad(flow.group[piece] == 0, width)[None],
            "last": np.array([count - 1]),
            **({"since": _pad(flow.since[piece], width)[None]} if self.program.barrier else {}),
            **slots.feed(),
        }
        last = slots.block.head and piece.stop == flow.count  # of the runs before the last one nobody reads the logits
        out = graph.relay(feed, [*sum_names(slots.block), *(["logits"] if last else [])])
        slots.write(out.held, order)
        return out

    # ----------------------------------------------------------------------------------------------------------- cut
    def _cut(self, cut: CutProgram, flow: Flow, queries: dict[str, Rows], starts: list[int], trace: TurnTrace) -> Flow:
        """Compress the visual tokens of this turn, which begins at slot `starts[i]` of block i."""
        size, count = cut.tokens_in, flow.count
        places, alive = self._candidates(cut, flow)
        feed: dict[str, Held] = {
            "hidden": flow.hidden.piece(0, count, size),
            "positions": _pad(flow.positions.T, size).T[:, None].copy(),
            "order": _pad(flow.order, size, -1)[None],
            "valid": (np.arange(size) < count)[None],
            "group": _pad(flow.group, size)[None].astype(np.int64),
            "candidates": places[None],
            "candidate_valid": alive[None],
            "last": np.array([count - 1]),
            **self._text(cut, flow),
            **{s.input: flow.states[s.input] for s in cut.entering},
            **{f"text.{n}": flow.states[f"text.{n}"] for n in cut.towers},
        }
        if cut.previous:
            before = self.slots[cut.before_block - 1]
            layer = cut.layer - 1
            query = queries[f"query.{layer}"].piece(0, *((count, size) if before.block.query_rows[layer] == "all" else (1, 1)))
            slots = starts[cut.before_block - 1] + np.arange(count)
            feed |= {"slots": _pad(slots, size)[None], "slot_order": before.order, "slot_valid": before.valid}
            feed |= {f"query.{layer}": query, f"key.{layer}": before.key(layer)}
        feed |= {name: pad_columns(found, size) for name, found in flow.sums.items()}
        if cut.next:
            after = self.slots[cut.before_block]
            feed |= {"next_order": after.order, "next_valid": after.valid, f"next_key.{cut.layer}": after.key(cut.layer)}
        kept = [f"kept.{n}" for n in range(len(cut.methods)) if cut.visual_out or n < len(cut.methods) - 1]
        found = self._backend.graph(cut.file).relay(feed, [*kept, "source", "place", *(f"kv.{layer}" for layer in cut.kv)])
        out = found.arrays
        for stage in range(len(cut.methods)):
            name = f"kept.{stage}"  # a last stage that leaves no token has no such output
            trace.kept[(cut.before_block, stage)] = out[name][0] if name in kept else np.zeros(0, np.int64)
        visual = int((trace.kept[(cut.before_block, len(cut.methods) - 1)] != -1).sum())
        if (text := int((flow.group == 0).sum())) + visual > cut.tokens_out:
            raise RuntimeInputError(
                f"the prompt has {text} text tokens beside pictures, the bundle takes {cut.tokens_out - visual} behind the cut at layer "
                f"{cut.layer}; shorten it, or build with a larger inputs.text_tokens"
            )
        left = text + visual
        if not left:
            raise RuntimeInputError(f"nothing is left of the prompt behind the cut at layer {cut.layer}; write a question")
        trace.visual.append(visual)
        self._prune_earlier(cut, out, starts, count)
        origin, place = out["source"][0, :left], out["place"][0, :left]
        states = {**flow.states, **{s.input: found.held[s.output] for s in cut.leaving}}
        hidden = self._backend.rows(f"cut_{cut.before_block}.hidden_out", cut.tokens_out, 1)
        hidden.put(found.held["hidden_out"], 0, left)
        return Flow(hidden, flow.positions[:, origin], flow.order[place], flow.group[origin], flow.next_position, states)

    def _text(self, cut: CutProgram, flow: Flow) -> dict[str, Array]:
        """Places of the text tokens, where a stage of the cut reads them: int64 and bool `[1, t]`."""
        if not cut.text:
            return {}
        found = np.flatnonzero(flow.group == 0)
        if found.shape[0] > cut.text:
            raise RuntimeInputError(
                f"the prompt has {found.shape[0]} text tokens beside pictures, the cut at layer {cut.layer} reads {cut.text}; "
                "shorten it, or build with a larger inputs.text_tokens"
            )
        return {"text_places": _pad(found, cut.text)[None], "text_valid": (np.arange(cut.text) < found.shape[0])[None]}

    def _candidates(self, cut: CutProgram, flow: Flow) -> tuple[Array, Array]:
        """Places of the visual tokens, per picture padded to the bucket: int64 and bool `[m·v]`."""
        each = cut.visual_in // self.program.images
        places, alive = np.zeros((self.program.images, each), np.int64), np.zeros((self.program.images, each), np.bool_)
        for picture in range(int(flow.group.max())):
            found = np.flatnonzero(flow.group == picture + 1)
            if picture >= self.program.images or found.shape[0] > each:
                raise RuntimeInputError(
                    f"picture {picture + 1} brings {found.shape[0]} tokens; the bundle takes {self.program.images} picture(s) of {each}"
                )
            places[picture, : found.shape[0]], alive[picture, : found.shape[0]] = found, True
        return places.reshape(-1), alive.reshape(-1)

    def _prune_earlier(self, cut: CutProgram, out: Mapping[str, Array], starts: list[int], count: int) -> None:
        """Drop KV rows of earlier blocks that the method does not keep."""
        masks = {layer: out[f"kv.{layer}"][0, :count] for layer in cut.kv}
        for slots in self.slots[: cut.before_block]:
            layers = [i for i in range(slots.block.first, slots.block.last) if i in masks]
            if not layers:
                continue
            if len(layers) != slots.block.last - slots.block.first or any((masks[i] != masks[layers[0]]).any() for i in layers):
                raise BundleError(
                    f"the layers of block {slots.block.index} keep different KV rows, which share one slot table; build the bundle again"
                )
            slots.compact(starts[slots.block.index], masks[layers[0]])

    # ---------------------------------------------------------------------------------------------------------- step
    def step(self, token: int, *, keep: bool = True) -> Array:
        """Take one generated token and return the logits after it, float `[vocabulary]`.

        Args:
            token: its id.
            keep: return an array of its own; otherwise the next step may overwrite it.

        Raises:
            RuntimeInputError: the context is full.
        """
        for slots in self.slots:
            slots.check_room(1)
        self._token_cell[0] = token
        embed = self._backend.graph(self.program.embed["decode"].file)
        hidden: Held = embed.step({"input_ids": self._token}, ("hidden",)).arrays["hidden"]
        logits: Array = np.zeros(0)
        for slots, row, feed in zip(self.slots, self._step_rows, self._feeds, strict=True):
            feed["hidden"] = hidden
            row.fill(slots.next_position, self.length, self.since)
            out = self._backend.graph(slots.block.phases["decode"].file).step(feed, ("logits",) if slots.block.head else ())
            slots.write_one(out.held, self.length)
            slots.next_position += 1
            if slots.block.head:
                logits = out.arrays["logits"][0]
                if keep or logits.dtype != np.float32:
                    logits = logits.astype(np.float32)
            else:
                hidden = out.held["hidden_out"]
        self.length += 1
        return logits


def _pad(rows: Array, size: int, value: int = 0) -> Array:
    """Fill axis 0 up to `size`."""
    missing = size - rows.shape[0]
    if missing == 0:
        return np.ascontiguousarray(rows)
    return np.concatenate([rows, np.full((missing, *rows.shape[1:]), value, rows.dtype)])
