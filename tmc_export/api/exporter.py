"""Plan → one subgraph after the other: the static ones of `onnx/`, the symbolic blocks of `engines/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tmc_export.api._schemes import GraphKind, PartSchemes, Read, reads_of
from tmc_export.api._slot_codes import quantize_slots, slot_codes
from tmc_export.api.eager import Runnable
from tmc_export.api.resuming import journaled_store
from tmc_export.bundle.journal import Journal
from tmc_export.bundle.program import (
    BlockProgram,
    CutProgram,
    GraphPhase,
    PhaseName,
    RowSum,
    StateProgram,
    TowerProgram,
    VisionProgram,
)
from tmc_export.export.capture import capture, run_on_shapes
from tmc_export.export.checkpoint import Checkpoint, TensorSource, open_checkpoint
from tmc_export.export.learned import LearnedSource
from tmc_export.export.skeleton import make_skeleton
from tmc_export.export.store import WeightStore
from tmc_export.export.text_tower import open_tower
from tmc_export.families import FAMILIES
from tmc_export.families._contract import DecoderParts, Family, ModelFiles
from tmc_export.graphs._contract import Attention, TextTower
from tmc_export.passes.pipeline import clean, finish, specialize
from tmc_export.plan.states import entering, leaving_cut, leaving_vision
from tmc_export.plan.towers import asked_towers
from tmc_export.plan.types import BlockPlan, CutPlan, Plan, TowerPlan, VisionPlan
from tmc_export.quantize.calibrated import Calibrated
from tmc_export.surgery._states import Handed, StateBook
from tmc_export.surgery.attention import register_attention
from tmc_export.surgery.block import DecoderBlock
from tmc_export.surgery.cut import Cut
from tmc_export.surgery.embed import Embed
from tmc_export.surgery.learned import Learned
from tmc_export.surgery.text_tower import TextTowerGraph
from tmc_export.surgery.vision import Vision

__all__ = ["Exporter", "Progress", "learned_sources"]

Progress = Callable[[str], None]
Symbols = list[dict[int, str] | None]
Weighted = tuple[nn.Module, TensorSource]
Subgraph = Vision | Embed | DecoderBlock | Cut | TextTowerGraph
_T, _P = 5, 7
"""Sizes of the traced examples; any two numbers above 1 that differ do."""


class Exporter:
    """Makes a plan's subgraphs one by one.

    Args:
        plan, files, folder, config, out, fit, opset, progress: as `export_subgraphs` takes them.
        found: what calibration found, where a scheme needs data.
        write: False writes nothing and traces nothing: modules only run on shapes.
        trace: trace although nothing is written, to see what reads weights.
        journal: of the folder `out`; None: nothing is recorded or taken up again.

    Attributes:
        runnables: by the bundle file that it is traced for, every module and how it is called.
        towers: by file, the text tower and where its weights are read.
        saved: bundle files that were written since the list was last cleared.
        reads: by file, what reads weights in it; filled by `trace`.
    """

    def __init__(
        self,
        plan: Plan,
        files: ModelFiles,
        folder: Path,
        config: Any,
        out: Path,
        fit: str | None,
        opset: int,
        progress: Progress,
        found: Calibrated | None = None,
        write: bool = True,
        journal: Journal | None = None,
        trace: bool = False,
    ) -> None:
        self.write, self.journal, self._traces = write, journal, write or trace
        self.saved: list[str] = []
        self.reads: dict[str, list[Read]] = {}
        found = found or Calibrated()
        self.kv = slot_codes(plan, found.slots or None)
        self.runnables: dict[str, Runnable] = {}
        self.towers: dict[str, Weighted] = {}
        self.opset = opset
        self.plan, self.files, self.out, self.fit, self.progress = plan, files, out, fit, progress
        self.dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[plan.dtype]
        self.model: nn.Module = make_skeleton(config, self.dtype, register_attention())
        self.checkpoint: Checkpoint = open_checkpoint(folder, self.model)
        self.family: type[Family] = FAMILIES.get(plan.facts.family)
        self.parts: DecoderParts = self.family.decoder(self.model)
        self.onnx, self.engines = out / "onnx", out / "engines"
        if write:
            self.onnx.mkdir(parents=True, exist_ok=True)
        self.store = WeightStore(self.onnx) if journal is None else journaled_store(self.onnx, journal)
        self.schemes = PartSchemes(plan, self.model, self.checkpoint, self.parts, found)
        self.profiles: list[dict[str, Any]] = []
        self.handed: dict[int, list[Handed]] = {}  # recipe entry -> what its last stage so far left for another graph

    # ------------------------------------------------------------------------------------------------------ tracing
    def _trace(
        self, module: Subgraph, examples: list[Tensor], symbols: Symbols | None = None, tower: Weighted | None = None
    ) -> ir.Model | None:
        """Trace a subgraph; where nothing is written it only runs, on shapes.

        Args:
            module: what is traced.
            examples: an input each; shapes and dtypes count.
            symbols: per input, axis → name of its symbolic dimension; None: every size is a number.
            tower: the model that the module is of and where its weights are read, where it is not `self.model`.
        """
        model = None
        symbols = symbols or [None] * len(examples)
        if self._traces:
            whole, checkpoint = tower or (self.model, self.checkpoint)
            model = clean(
                capture(
                    module, examples, input_names=module.input_names(), output_names=module.output_names, symbols=symbols, model=whole,
                    checkpoint=checkpoint, learned=learned_sources(module), opset=self.opset,
                )
            )  # fmt: skip
            quantize_slots(model, self.kv, self.plan.dtype)
        else:
            run_on_shapes(module, examples)
        names, outputs = tuple(module.input_names()), tuple(module.output_names())
        self._traced = Runnable(module, names, tuple(examples), tuple(symbols), outputs)
        return model

    def _save(
        self, model: ir.Model | None, name: str, sizes: dict[str, int], kind: GraphKind, data: str, append: bool = False,
        visual: int | None = None,
    ) -> str:  # fmt: skip
        """Make a traced graph static and write it; `append` and `visual` as `specialize` and `finish` take them."""
        file = f"onnx/{name}.onnx"
        self.runnables[file] = replace(self._traced, kind=kind)
        if model is not None and not self.write:
            self.reads[file] = reads_of(model, kind)
        if model is None or not self.write:
            return file
        static = specialize(model, sizes, name, append=append, causal=kind == "block" and not append)
        self.schemes.apply(static, kind)
        finish(static, visual=visual)
        self.store.externalize(static, data)
        ir.save(static, self.onnx / f"{name}.onnx")
        self.saved.append(file)
        return file

    # ------------------------------------------------------------------------------------------------------- parts
    def vision(self, plan: VisionPlan) -> VisionProgram:
        """The graph of a picture bucket."""
        name = f"vision_{plan.index}"
        self.progress(name)
        rule = self.family.image_rule(self.files, plan.size, self.fit)
        parts, towers = self.family.vision(self.model, plan.size, plan.grid), asked_towers(self.plan, plan.stages)
        module = Vision(parts, plan, self.dtype, leaving_vision(self.plan), towers)
        inputs = [torch.zeros(self.plan.batch, *rule.shape, dtype=self.dtype), *self._texts(towers, self.plan.batch)]
        model = self._trace(module, inputs)
        self._hand_on(module.states)
        file = self._save(model, name, {}, "vision", "vision.data")
        precision = self._precision("encoder")
        self.profiles.append({"name": name, "onnx": file, "precision": precision, "profiles": [{"name": "static", "shapes": {}}]})
        return VisionProgram(
            file=file,
            tokens=plan.tokens,
            full_grid=plan.facts.visual_grid,
            grid=plan.out_grid,
            barrier=plan.barrier,
            stages=tuple(s.method for s in plan.stages),
            rule=rule.to_json(),  # type: ignore[arg-type]
            states=_states(module.states.handed),
            towers=_numbers(towers),
        )

    def _texts(self, towers: Mapping[TextTower, TowerPlan], rows: int) -> list[Tensor]:
        """Examples of what text towers bring, one per tower."""
        widths = {t.index: t.width for t in towers.values()}
        return [torch.zeros(rows, width, dtype=self.dtype) for width in widths.values()]

    def tower(self, plan: TowerPlan, folder: Path) -> TowerProgram:
        """The graph of a text tower, whose weights lie in `folder`."""
        name = f"text_tower_{plan.index}"
        self.progress(name)
        tower = open_tower(folder, plan.index, self.dtype)
        model = self._trace(TextTowerGraph(tower[0], plan), [torch.zeros(1, plan.tokens, dtype=torch.long)], tower=tower)
        self.towers[f"onnx/{name}.onnx"] = tower
        file = self._save(model, name, {}, "tower", f"{name}.data")
        self.profiles.append({"name": name, "onnx": file, "precision": self.plan.dtype, "profiles": [{"name": "static", "shapes": {}}]})
        return TowerProgram(file=file, folder=f"towers/{plan.index}", tokens=plan.tokens, width=plan.width)

    def embed(self) -> dict[PhaseName, GraphPhase]:
        """The token table's graphs, per phase."""
        self.progress("embed")
        model = self._trace(Embed(self.parts), [torch.zeros(self.plan.batch, _T, dtype=torch.long)], [{1: "T"}])
        sizes: dict[PhaseName, int] = {
            "prefill": self.plan.images * self._visual() + self.plan.text_tokens,
            "chunk": self.plan.chunk,
            "decode": 1,
        }
        return {
            phase: GraphPhase(file=self._save(model, f"embed_{phase}", {"T": t}, "embed", "embed.data"), tokens=t)
            for phase, t in sizes.items()
        }

    def _visual(self) -> int:
        return max((v.tokens for v in self.plan.vision), default=0)

    def block(self, plan: BlockPlan) -> BlockProgram:
        """A block's static graphs, and its symbolic one for the engine builder."""
        name = f"block_{plan.index}"
        self.progress(name)
        module = DecoderBlock(self.parts, plan, self.plan.windows)
        inputs, symbols = self._block_inputs(plan, module.needs_last)
        model = self._trace(module, inputs, symbols)
        phases: dict[PhaseName, tuple[int, int]] = {
            "prefill": (plan.tokens, 0), "chunk": (self.plan.chunk, plan.capacity), "decode": (1, plan.capacity),
        }  # fmt: skip
        programs: dict[PhaseName, GraphPhase] = {}
        for phase, (t, p) in phases.items():
            append = phase == "decode"
            plain = set(self.plan.windows[plan.first : plan.last]) == {None} and not plan.since
            own = append and self.plan.runtime == "onnxruntime" and plain  # onnxruntime's operators
            visual = (0 if self.plan.memory_tight else self.plan.images * plan.visual_tokens) if own else None
            file = self._save(model, f"{name}_{phase}", {"T": t, "P": p - 1 if append else p}, "block", f"{name}.data", append, visual)
            programs[phase] = GraphPhase(file=file, tokens=t, past=p)
        if model is not None and self.write:
            self._symbolic(model, name, phases)
        return BlockProgram(
            index=plan.index, first=plan.first, last=plan.last, tokens=plan.tokens, capacity=plan.capacity,
            query_rows=dict(plan.query_rows), head=plan.head, phases=programs,
            row_sums={layer: tuple(map(_row_sum, needs)) for layer, needs in plan.row_sums.items()},
        )  # fmt: skip

    def _block_inputs(self, plan: BlockPlan, last: bool) -> tuple[list[Tensor], Symbols]:
        b, d = self.plan.batch, self.plan.facts.decoder
        long, flag = torch.long, torch.bool
        inputs = [
            torch.zeros(b, _T, d.width, dtype=self.dtype), torch.zeros(d.rope_axes, b, _T, dtype=long), torch.zeros(b, _T, dtype=long),
            torch.ones(b, _T, dtype=flag), torch.zeros(b, _P, dtype=long), torch.ones(b, _P, dtype=flag),
        ]  # fmt: skip
        symbols: Symbols = [{1: "T"}, {2: "T"}, {1: "T"}, {1: "T"}, {1: "P"}, {1: "P"}]
        if plan.since:
            inputs.append(torch.zeros(b, _T, dtype=long))
            symbols.append({1: "T"})
        if plan.row_sums:
            inputs.append(torch.ones(b, _T, dtype=flag))
            symbols.append({1: "T"})
        if last:
            inputs.append(torch.zeros(b, dtype=long))
            symbols.append(None)
        for _ in range(2 * (plan.last - plan.first)):
            inputs.append(torch.zeros(b, d.kv_heads, _P, d.head_dim, dtype=self.dtype))
            symbols.append({2: "P"})
        return inputs, symbols

    def _symbolic(self, model: ir.Model, name: str, phases: dict[PhaseName, tuple[int, int]]) -> None:
        """Keep the symbolic block that was traced last for the engine builder, with the shapes of its phases."""
        self.engines.mkdir(exist_ok=True)
        symbolic = model.clone()
        symbolic.graph.name = name
        self.schemes.apply(symbolic, "block", engine=True)
        finish(symbolic, static=False)
        self.store.externalize(symbolic, f"{name}.data")
        for value in symbolic.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    f"../onnx/{tensor.location}", tensor.offset, tensor.length, tensor.dtype,
                    shape=tensor.shape, name=tensor.name or "", base_dir=self.engines,
                )  # fmt: skip
        ir.save(symbolic, self.engines / f"{name}.onnx")
        self.saved.append(f"engines/{name}.onnx")
        profiles = []
        for phase, (t, p) in phases.items():
            if phase == "decode":
                t = self.plan.decode_width
            size = {"T": t, "P": p}
            shapes = {
                n: [size[axes[i]] if axes and i in axes else int(s) for i, s in enumerate(x.shape)]
                for n, x, axes in zip(self._traced.inputs, self._traced.examples, self._traced.symbols, strict=True)
            }
            profiles.append({"name": phase, "shapes": shapes})
        precision = self._precision("decoder")
        self.profiles.append({"name": name, "onnx": f"engines/{name}.onnx", "precision": precision, "profiles": profiles})

    def _precision(self, part: str) -> str:
        """How a part's weights are stored, for the engine builder's estimate of memory."""
        scheme = self.plan.quantize.get(part)
        if scheme is None or scheme.weights not in ("fp16", "bf16"):
            return self.plan.dtype if scheme is None else scheme.weights
        return "widened" if self.plan.dtype == "float32" else self.plan.dtype

    def cut(self, plan: CutPlan) -> CutProgram:
        """The compress graph of a cut; graphs are made in the order they run, because states are known once their graph was traced."""
        name = f"compress_{plan.before_block}"
        self.progress(name)
        given = [self._entering(h, plan) for entry in entering(self.plan, plan) for h in self.handed.get(entry, [])]
        towers = asked_towers(self.plan, plan.stages)
        module = Cut(
            self.parts, plan, self.plan.images, self.plan.facts, self.plan.windows, self.dtype, given, leaving_cut(self.plan, plan), towers
        )  # fmt: skip
        inputs = [*self._cut_inputs(module, plan), *self._texts(towers, self.plan.batch * self.plan.images)]
        model = self._trace(module, inputs)
        self._hand_on(module.states)
        file = self._save(model, name, {}, "compress", f"{name}.data")
        self.profiles.append({"name": name, "onnx": file, "precision": self.plan.dtype, "profiles": [{"name": "static", "shapes": {}}]})
        return CutProgram(
            before_block=plan.before_block, layer=plan.layer, file=file, tokens_in=plan.tokens_in, tokens_out=plan.tokens_out,
            visual_in=plan.visual_in, visual_out=plan.visual_out, positions=plan.positions,
            previous=bool(module.previous), next=bool(module.next), sums=len(plan.summed),
            kv=tuple(sorted({i for s in plan.stages for i in s.after.kv_rows})), methods=tuple(s.method for s in plan.stages),
            text=module.text_places, entering=_states(given), leaving=_states(module.states.handed),
            towers=_numbers(towers),
        )  # fmt: skip

    def _hand_on(self, states: StateBook) -> None:
        """Remember what leaves a graph: it replaces what the entry handed on before."""
        for entry in states.entries:
            self.handed[entry] = [h for h in states.handed if h.entry == entry]

    def _entering(self, handed: Handed, cut: CutPlan) -> Handed:
        """A state as a cut gets it: from a vision graph, one item for every picture of the bucket."""
        scope = next(s.scope for s in cut.stages if s.entry == handed.entry)
        items = self.plan.batch * (self.plan.images if scope == "image" else 1)
        return replace(handed, shape=(items, *handed.shape[1:]))

    def _cut_inputs(self, module: Cut, plan: CutPlan) -> list[Tensor]:
        b, d, s, n = self.plan.batch, self.plan.facts.decoder, plan.tokens_in, plan.visual_in
        long, flag = torch.long, torch.bool
        inputs = [
            torch.zeros(b, s, d.width, dtype=self.dtype), torch.zeros(d.rope_axes, b, s, dtype=long), torch.zeros(b, s, dtype=long),
            torch.ones(b, s, dtype=flag), torch.zeros(b, s, dtype=long), torch.zeros(b, n, dtype=long), torch.ones(b, n, dtype=flag),
            torch.zeros(b, dtype=long),
        ]  # fmt: skip
        if t := module.text_places:
            inputs += [torch.zeros(b, t, dtype=long), torch.ones(b, t, dtype=flag)]
        if module.previous:
            before = self.plan.blocks[plan.before_block - 1]
            rows = 1 if before.query_rows[plan.layer - 1] == "last" else s
            c = before.capacity
            inputs += [
                torch.zeros(b, s, dtype=long), torch.zeros(b, c, dtype=long), torch.ones(b, c, dtype=flag),
                torch.zeros(b, d.heads, rows, d.head_dim, dtype=self.dtype), torch.zeros(b, d.kv_heads, c, d.head_dim, dtype=self.dtype),
            ]  # fmt: skip
        inputs += [torch.zeros(b, *([d.heads] if n.heads == "none" else []), s) for n in plan.summed]
        if module.next:
            c = self.plan.blocks[plan.before_block].capacity
            inputs += [
                torch.zeros(b, c, dtype=long), torch.ones(b, c, dtype=flag), torch.zeros(b, d.kv_heads, c, d.head_dim, dtype=self.dtype),
            ]  # fmt: skip
        return inputs + [torch.zeros(h.shape, dtype=h.dtype) for h in module.entering]


def _row_sum(need: Attention) -> RowSum:
    return RowSum.model_validate({"rows": need.rows, "heads": need.heads})


def _numbers(towers: Mapping[TextTower, TowerPlan]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(t.index for t in towers.values()))


def _states(handed: Sequence[Handed]) -> tuple[StateProgram, ...]:
    return tuple(StateProgram(entry=h.entry, name=h.name, shape=h.shape, dtype=str(h.dtype).removeprefix("torch.")) for h in handed)


def learned_sources(module: nn.Module) -> dict[str, tuple[TensorSource, str]]:
    """Where the learned parameters of a subgraph are read, by their name in it."""
    found: dict[str, tuple[TensorSource, str]] = {}
    for place, child in module.named_children():
        for local, weights, name in child.sources() if isinstance(child, Learned) else ():
            source = LearnedSource(weights.shapes, weights.path, weights.prefix, weights.random or 0)
            found[f"{place}.{local}"] = source, name
    return found
