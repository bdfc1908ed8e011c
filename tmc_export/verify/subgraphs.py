"""Every subgraph on its own: fed with the reference's inputs, so that one that is wrong does not blame the next.

Only first turns are used (no past of earlier turns). The prefill graphs get the whole prompt, the chunk and decode graphs its end with the
rest as past, so that all of them answer to the same reference values.

Legend: T tokens of the prompt, S its bucket, C slots, c channels, r rotary axes, g KV heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import BlockProgram, CutProgram, GraphPhase, Program
from tmc_export.runtime._backend import Backend, BackendOptions, open_backend, options_for
from tmc_export.runtime._barrier import since_of
from tmc_export.runtime._chat import expand_image_tokens
from tmc_export.runtime._sums import columns_of_turn, pad_columns
from tmc_export.runtime._text_tower import TextTowers
from tmc_export.verify._slots import compare_rows, filled_slots
from tmc_export.verify._states import compare_states, entering_state
from tmc_export.verify._sums import expected_sums
from tmc_export.verify._trace import BlockTrace
from tmc_export.verify.compare import Check, compare_indices, compare_tensor
from tmc_export.verify.play import by_cut, expected_places, is_tie, live_places
from tmc_export.verify.recorded import Case, CaseTurn
from tmc_export.verify.tolerances import Tolerance, margin_bound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["check_subgraphs"]


def check_subgraphs(
    bundle: Path, program: Program, cases: Sequence[Case], tolerance: Tolerance, precision: str, backend: Backend | None = None
) -> Iterator[Check]:
    """Compare every subgraph with the reference, in the order they run.

    Args:
        bundle: the folder.
        program: from its manifest.
        cases: answered by a reference made with `trace=True`.
        tolerance: for tensors.
        precision: row of the margin table.
        backend: what runs the graphs; onnxruntime, int4 weights multiplied as on a device, when None.
    """
    if backend is None:
        backend = open_backend("onnxruntime", bundle, BackendOptions(int4_accuracy=1, phases=options_for(program).phases))
    runner = _Runner(bundle, program, backend, tolerance, precision)
    for case in cases:
        turn = case.turns[0]
        if len(turn.expected.blocks) != len(program.blocks):
            traced, wanted = len(turn.expected.blocks), len(program.blocks)
            yield Check(case.name, None, False, f"the reference traced {traced} blocks, the bundle has {wanted}; its plan is another")
            continue
        if turn.pixels:
            yield from runner.towers(case.name, turn)
        yield from runner.vision(case.name, turn)
        yield from runner.embed(case.name, turn)
        for index, block in enumerate(program.blocks):
            cut = program.cut_before(index)
            if cut is not None and turn.pixels:
                yield from runner.cut(case.name, turn, cut)
            yield from runner.block(case.name, turn, block)


class _Runner:
    def __init__(self, bundle: Path, program: Program, backend: Backend, tolerance: Tolerance, precision: str) -> None:
        self.program, self.backend, self.tolerance, self.precision = program, backend, tolerance, precision
        self.texts = TextTowers(program.towers, bundle, backend)

    def _float(self, array: Array) -> Array:
        return np.ascontiguousarray(array, dtype=self.program.dtype)

    # ----------------------------------------------------------------------------------------------- towers, vision, embed
    def towers(self, name: str, turn: CaseTurn) -> Iterator[Check]:
        """A question → what every text tower makes of it."""
        for index, spec in enumerate(self.program.towers):
            out = self.backend.graph(spec.file).run({"ids": self.texts.ids(index, turn.text)})
            got = out["embedding"][0] if "embedding" in out else None
            yield compare_tensor(f"{name}/text tower {index}", got, turn.expected.texts[index], self.tolerance, spec.file)

    def _texts(self, turn: CaseTurn, towers: Sequence[int], rows: int) -> dict[str, Array]:
        """What text towers bring: the question's embedding for the turn's pictures, zeros for missing ones."""
        found: dict[str, Array] = {}
        for index in towers:
            filled = np.zeros((rows, self.program.towers[index].width), np.float32)
            filled[: min(rows, len(turn.pixels))] = turn.expected.texts[index]
            found[f"text.{index}"] = self._float(filled)
        return found

    def vision(self, name: str, turn: CaseTurn) -> Iterator[Check]:
        """Pixels → tokens and sources, picture by picture."""
        for picture, pixels in enumerate(turn.pixels):
            spec = self.program.vision[turn.buckets[picture]]
            out = self.backend.graph(spec.file).run({"pixels": self._float(pixels[None]), **self._texts(turn, spec.towers, 1)})
            label, ties = f"{name}/picture {picture + 1}", False
            wanted = [s for s in turn.expected.stages if s.picture == picture + 1 and not s.at.startswith("decoder")]
            for number, stage in enumerate(wanted):
                found = out.get(f"source.{number}")
                got = None if found is None else found[0].astype(np.int64)
                check = compare_indices(
                    f"{label}/{stage.method} at {stage.at}",
                    got,
                    stage.source,
                    tied=got is not None and stage.excuses_source(got, margin_bound(self.precision)),
                    margin=stage.margin,
                    subgraph=spec.file,
                )
                ties = ties or bool(check.exceptions)
                yield check
            if not ties:
                yield from compare_states(label, spec.states, out, wanted, self.tolerance, spec.file)
                tokens = out["tokens"][0] if "tokens" in out else None
                yield compare_tensor(f"{label}/tokens", tokens, turn.expected.vision[picture], self.tolerance, spec.file)

    def embed(self, name: str, turn: CaseTurn) -> Iterator[Check]:
        """Text ids → rows, through each of the three graphs."""
        first = turn.expected.blocks[0]
        want = first.hidden_in[first.group == 0]
        text = np.array([i for i in turn.ids if i != self.program.image_token], np.int64)
        for phase, spec in self.program.embed.items():
            count = min(len(text), spec.tokens)
            out = self.backend.graph(spec.file).run({"input_ids": _pad(text[:count], spec.tokens)[None]})
            got = out["hidden"][0, :count] if "hidden" in out else None
            yield compare_tensor(f"{name}/embed {phase}", got, want[:count], self.tolerance, spec.file)

    # ------------------------------------------------------------------------------------------------------------ blocks
    def block(self, name: str, turn: CaseTurn, block: BlockProgram) -> Iterator[Check]:
        """All phases of a block."""
        trace = turn.expected.blocks[block.index]
        count = trace.order.shape[0]
        for phase, spec in block.phases.items():
            start = 0 if phase == "prefill" else max(0, count - spec.tokens)
            out = self._run(block, trace, spec, start)
            label = f"{name}/block {block.index} {phase}"
            for layer, rows in block.query_rows.items():
                made = out.get(f"query.{layer}")
                want = trace.queries[layer][:, -1:] if rows == "last" else trace.queries[layer][:, start:]
                got = None if made is None else made[0, :, : want.shape[1]]
                yield compare_tensor(f"{label}/query {layer}", got, want, self.tolerance, spec.file)
            for layer, sums in block.row_sums.items() if phase != "decode" else ():  # a generated token is followed by no cut
                for number, (one, want) in enumerate(zip(sums, expected_sums(trace, layer, sums, start), strict=True)):
                    made = out.get(f"sums.{layer}.{number}")
                    got = None if made is None else columns_of_turn(made[0], spec.past, 0, count, slice(start, count))
                    yield compare_tensor(f"{label}/sum of {one.rows} rows, layer {layer}", got, want, self.tolerance, spec.file)
            if block.head:
                logits = out["logits"] if "logits" in out else None
                yield compare_tensor(f"{label}/logits", logits, turn.expected.logits[:1], self.tolerance, spec.file)
            else:
                hidden = out["hidden_out"][0, : count - start] if "hidden_out" in out else None
                yield compare_tensor(f"{label}/hidden", hidden, trace.hidden_out[start:], self.tolerance, spec.file)
            for layer in range(block.first, block.last):
                for kind, wanted in (("key", trace.keys[layer]), ("value", trace.values[layer])):
                    present, slot = out.get(f"present.{layer}.{kind}"), f"{layer}.{kind}"
                    got = None if present is None else present[0, :, : count - start]
                    where, want = f"{label}/{kind} {layer}", wanted[:, start:]
                    yield compare_rows(where, self.program, slot, got, want, self.tolerance, self.precision, spec.file)

    def _run(self, block: BlockProgram, trace: BlockTrace, spec: GraphPhase, start: int) -> dict[str, Array]:
        """Feed a graph with the prompt from `start` on, the rows before it being its past."""
        width, past = spec.tokens, spec.past
        order = trace.order[start:]
        feed: dict[str, Array] = {
            "hidden": self._float(_pad(trace.hidden_in[start:], width)[None]),
            "positions": np.ascontiguousarray(_pad(trace.positions[:, start:].T, width).T[:, None]),
            "order": _pad(order, width, -1)[None],
            "valid": (np.arange(width) < order.shape[0])[None],
            "text": _pad(trace.group[start:] == 0, width)[None],
            "last": np.array([order.shape[0] - 1]),
            "since": _pad(since_of(trace.group, trace.order, self.program.barrier, 0)[0][start:], width)[None],
            "past_order": _pad(trace.order[:start], past)[None],
            "past_valid": (np.arange(past) < start)[None],
        }
        for layer in range(block.first, block.last):
            for kind, rows in (("key", trace.keys[layer]), ("value", trace.values[layer])):
                feed[f"past_key_values.{layer}.{kind}"] = filled_slots(self.program, f"{layer}.{kind}", rows[:, :start], past)
        return self.backend.graph(spec.file).run(feed)

    def _rows(self, rows: Array, size: int) -> Array:
        """`[h, T, d]` → `[1, h, size, d]`."""
        return self._float(_pad(rows.swapaxes(0, 1), size).swapaxes(0, 1)[None])

    # -------------------------------------------------------------------------------------------------------------- cuts
    def cut(self, name: str, turn: CaseTurn, cut: CutProgram) -> Iterator[Check]:
        """One compress graph: what it keeps, and the sequence it leaves."""
        after = turn.expected.blocks[cut.before_block]
        arriving = turn.expected.blocks[cut.before_block - 1] if cut.before_block else None
        hidden, positions, order, group = self._arriving(turn, arriving)
        feed = self._cut_feed(cut, arriving, hidden, positions, order, group)
        feed |= {s.input: entering_state(s, cut.layer, turn.expected.stages) for s in cut.entering}
        feed |= self._texts(turn, cut.towers, self.program.images)
        out = self.backend.graph(cut.file).run(feed)
        ties = False
        label = f"{name}/cut before block {cut.before_block}"
        for number, traces in enumerate(by_cut(turn.expected.stages, cut.layer)):
            got = out.get(f"kept.{number}")
            emptied = number == len(cut.methods) - 1 and cut.visual_out == 0  # such a stage has no output
            live = np.zeros(0, np.int64) if emptied else live_places(None if got is None else got[0])
            check = compare_indices(
                f"{label}/{traces[0].method}",
                live,
                expected_places(traces, cut, self.program.images),
                tied=is_tie(traces, live, cut, self.program.images, margin_bound(self.precision)),
                margin=min((t.margin for t in traces if t.margin is not None), default=None),
                subgraph=cut.file,
            )
            ties = ties or bool(check.exceptions)
            yield check
        if ties:
            return
        left = int(out["valid_out"].sum()) if "valid_out" in out else 0
        rows = out["hidden_out"][0, :left] if "hidden_out" in out else None
        places = order[out["place"][0, :left]] if "place" in out else None
        yield compare_indices(f"{label}/places", places, after.order, tied=False, subgraph=cut.file)
        if cut.positions == "keep":
            origins = positions[:, out["source"][0, :left]] if "source" in out else None
            yield compare_indices(f"{label}/positions", origins, after.positions, tied=False, subgraph=cut.file)
        yield compare_tensor(f"{label}/hidden", rows, after.hidden_in, self.tolerance, cut.file)
        here = [t for traces in by_cut(turn.expected.stages, cut.layer) for t in traces]
        yield from compare_states(label, cut.leaving, out, here, self.tolerance, cut.file)

    def _arriving(self, turn: CaseTurn, before: BlockTrace | None) -> tuple[Array, Array, Array, Array]:
        """Hidden states, positions, places and groups at a cut: a block's output, or the assembled embeddings."""
        if before is not None:
            return before.hidden_out, before.positions, before.order, before.group
        ids, group = expand_image_tokens(turn.ids, self.program.image_token, [v.shape[0] for v in turn.expected.vision])
        first = turn.expected.blocks[0]
        hidden = np.zeros((ids.shape[0], self.program.width), np.float32)
        hidden[group == 0] = first.hidden_in[first.group == 0]
        for picture, tokens in enumerate(turn.expected.vision):
            hidden[group == picture + 1] = tokens
        places = np.arange(ids.shape[0])
        positions = turn.expected.positions
        if positions is None:
            positions = np.broadcast_to(places, (self.program.rope_axes, ids.shape[0]))
        return hidden, positions, places, group.astype(np.int64)

    def _cut_feed(
        self, cut: CutProgram, before: BlockTrace | None, hidden: Array, positions: Array, order: Array, group: Array
    ) -> dict[str, Array]:
        size, count = cut.tokens_in, order.shape[0]
        each = cut.visual_in // max(self.program.images, 1)
        candidates, alive = np.zeros((self.program.images, each), np.int64), np.zeros((self.program.images, each), np.bool_)
        for picture in range(int(group.max())):
            found = np.flatnonzero(group == picture + 1)
            candidates[picture, : len(found)], alive[picture, : len(found)] = found, True
        feed: dict[str, Array] = {
            "hidden": self._float(_pad(hidden, size)[None]),
            "positions": np.ascontiguousarray(_pad(positions.T, size).T[:, None]),
            "order": _pad(order, size, -1)[None],
            "valid": (np.arange(size) < count)[None],
            "group": _pad(group, size)[None],
            "candidates": candidates.reshape(1, -1),
            "candidate_valid": alive.reshape(1, -1),
            "last": np.array([count - 1]),
        }
        if cut.text:
            found = np.flatnonzero(group == 0)
            feed |= {"text_places": _pad(found, cut.text)[None], "text_valid": (np.arange(cut.text) < len(found))[None]}
        if cut.previous and before is not None:
            layer, slots = cut.layer - 1, self.program.blocks[cut.before_block - 1].capacity
            rows = before.queries[layer]
            if self.program.blocks[cut.before_block - 1].query_rows[layer] == "last":
                query = self._float(rows[None, :, -1:])
            else:
                query = self._rows(rows, size)
            feed |= {"slots": _pad(np.arange(count), size)[None], "slot_order": _pad(order, slots)[None]}
            feed |= {"slot_valid": (np.arange(slots) < count)[None], f"query.{layer}": query}
            feed[f"key.{layer}"] = filled_slots(self.program, f"{layer}.key", before.keys[layer], slots)
        if cut.sums and before is not None:
            layer = cut.layer - 1
            sums = expected_sums(before, layer, self.program.blocks[cut.before_block - 1].row_sums[layer], 0)
            for number, columns in enumerate(sums):
                feed[f"sums.{layer}.{number}"] = pad_columns(columns, size)[None]
        if cut.next:
            slots = self.program.blocks[cut.before_block].capacity
            feed |= {"next_order": np.zeros((1, slots), np.int64), "next_valid": np.zeros((1, slots), np.bool_)}
            shape = (1, self.program.kv_heads, slots, self.program.head_dim)
            feed[f"next_key.{cut.layer}"] = np.zeros(shape, self.program.slot_dtype)
        return feed


def _pad(rows: Array, size: int, value: int = 0) -> Array:
    """Fill axis 0 up to `size`."""
    fill = np.full((size - rows.shape[0], *rows.shape[1:]), value, rows.dtype)
    return np.concatenate([rows, fill])
