"""A recipe entry's selector alone, at real sizes: every stage of the method and the scores it asks for, as one static graph.

    python -m benchmarks._selector FOLDER [METHOD ...]

Writes `FOLDER/<method>-<visual tokens>.onnx`, traced and cleaned as a bundle's graphs are, its inputs beside it, and prints one JSON
object a line: the name, how many times the graph is to be reckoned, and the visual tokens that every decoder layer then sees. The layers
between two stages are left out: a stage gets what the one before returned, and query and key of its layer as inputs. Scores are made of
these in the graph: softmax over all keys; sums over all rows of a map are made by the block before, and what they cost it is timed apart
(`_map_sums.py`); where a stage asks for the layer to come, its projections are in the graph too. Putting the sequence together again
behind a decoder cut is not. Of a method of many stages four are in the graph, evenly spaced; `times` makes up for the others.

Legend: b pictures, S tokens of the prompt, n candidates, c channels, h heads, d channels of a head.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._map_sums import save_pair
from benchmarks._selector_cases import CASES, CROPS, PATCHES, TEXT, facts

if TYPE_CHECKING:
    from torch import Tensor

    from tmc_export.graphs._contract import Compressed, Context, Layout, Method, MethodConfig, Need, Stage

__all__ = ["Entry", "main"]

MOST, SOME = 7, 4
"""Of a method of more than 7 stages, 4 are timed."""


@dataclass(frozen=True)
class Step:
    """One stage with its numbers: `items` of `before.tokens` candidates each; `fresh` where the tokens are not those of the step before."""

    stage: Stage
    before: Layout
    after: Layout
    items: int
    fresh: bool

    @property
    def inside(self) -> bool:
        """It is a cut in the decoder."""
        return self.stage.at.part == "decoder"


class Entry:
    """A method's stages in a row.

    Args:
        name: of the method.
        visual: visual tokens of the prompt; a multiple of those of a picture are several pictures.
    """

    def __init__(self, name: str, visual: int) -> None:
        from tmc_export.graphs import METHODS
        from tmc_export.graphs._contract import Site

        self.name, self.visual, self.case, self.facts = name, visual, CASES[name], facts()
        self.method: type[Method] = METHODS.get(name)
        stages = self.method.stages(Site.parse(self.case.at), self._config(PATCHES), self.facts)
        self.repeats = 1
        self.pictures = visual // PATCHES
        if name != "globalcom2" and all(s.at.part != "decoder" for s in stages):  # the vision graph runs once a picture
            self.repeats, self.pictures = self.pictures, 1
        joint = self.pictures if self.case.scope == "joint" else 1
        self.config: MethodConfig = self._config(PATCHES * joint)
        self.joint = joint
        self.steps = self._walk(self.method.stages(Site.parse(self.case.at), self.config, self.facts))
        self.inputs: dict[str, Tensor] = {}
        self._seen: dict[int, tuple[Tensor | None, Tensor, Mapping[str, Tensor]]] = {}

    def _config(self, candidates: int) -> Any:
        return self.method.Config(**self.case.options(candidates))

    def _walk(self, stages: tuple[Stage, ...]) -> list[Step]:
        """Follow the layouts, as a plan does."""
        from tmc_export.graphs._contract import Layout, Segment

        encoder, width = self.facts.encoder, self.facts.decoder.width
        picture = Segment("visual", PATCHES, encoder.grid)
        layout = Layout((Segment("class", encoder.class_tokens), picture), encoder.width)
        items, steps = self.pictures, []
        if self.name == "globalcom2":  # thumbnail and crops arrive as one
            layout, items = Layout((picture,) * CROPS, width), 1
        inside = False
        for number, stage in enumerate(stages):
            fresh = number == 0
            if stage.at.part == "decoder" and not inside:
                inside, fresh = True, True
                visual = tuple(s for s in layout.segments if s.kind == "visual")
                tokens = sum(s.tokens for s in visual) * self.joint
                grid = visual[0].grid if len(visual) == 1 and self.joint == 1 else None
                layout, items = Layout((Segment("visual", tokens, grid),), width), self.pictures // self.joint
            after = self.method.layout(stage, layout, self.config, self.facts)
            steps.append(Step(stage, layout, after, items, fresh))
            layout = after
        return steps

    def layers(self) -> list[int]:
        """Visual tokens that every decoder layer sees, all pictures together."""
        steps, count = [s for s in self.steps if s.inside], self.visual
        if not steps or len(steps) < len(self.steps):  # stages before the decoder
            last = [s for s in self.steps if not s.inside][-1]
            count = (last.after.tokens - last.after.class_tokens) * last.items * self.repeats
        found = []
        for layer in range(self.facts.decoder.layers):
            for step in steps:
                if step.stage.at.layer == layer:
                    count = step.after.tokens * step.items
            found.append(count)
        return found

    # -------------------------------------------------------------------------------------------------------- graph
    def _given(self, name: str, *shape: int, scale: float = 1.0, value: Tensor | None = None) -> Tensor:
        """An input of the graph, random unless a value is given; the same one when it is traced."""
        import torch

        if name not in self.inputs:
            draw = torch.Generator().manual_seed(len(self.inputs))
            self.inputs[name] = torch.randn(shape, generator=draw) * scale if value is None else value.clone()
        return self.inputs[name]

    def run(self, inputs: Mapping[str, Tensor], only: Sequence[int] = ()) -> dict[str, Tensor]:
        """Compute the stages, all or some; inputs that are missing are made and remembered.

        A stage whose predecessor is left out gets what arrived there when all were computed.
        """
        import torch

        from tmc_export.graphs._contract import Context, TextEmbeds

        self.inputs = dict(inputs)
        shapes = self.method.weights(self.config, self.facts)
        weights = {name: self._given(f"weight.{name}", *shape, scale=max(shape) ** -0.5) for name, shape in shapes.items()}
        found: dict[str, Tensor] = {}
        out: Compressed | None = None
        for number, step in enumerate(self.steps):
            if only and number not in only:
                out = None
                continue
            b, n, c = step.items, step.before.tokens, step.before.width
            tokens, valid, state = self._arriving(number, step, out)
            index = torch.arange(n).expand(b, n)
            asked = [need for need in step.stage.needs if not isinstance(need, TextEmbeds)]
            wants_text = len(asked) < len(step.stage.needs)
            context: Context = Context(
                layout=step.before,
                facts=self.facts,
                valid=valid,
                source=index,
                positions=index[None] + 5 if step.inside else None,
                text=self._given(f"text.{number}", 1, TEXT, c).expand(b, -1, -1) if wants_text else None,
                text_valid=torch.ones(b, TEXT, dtype=torch.bool) if step.inside else None,
                captured={need: self._captured(number, step, need, tokens) for need in asked},
                state=state,
                weights=weights,
            )
            out = self.method.apply(step.stage, tokens, context, self.config)
            leaving = {"source": out.source, "tokens": out.tokens, "valid": out.valid, "text": out.text}
            leaving |= {f"kv.{layer}": rows for layer, rows in out.kv.items()}
            for key, x in leaving.items():
                given = [tokens, valid, *self.inputs.values(), *found.values()]  # what only passes through, or left already, is no output
                if x is not None and not any(x is y for y in given):
                    found[f"{key}.{number}"] = x
        return found

    def _arriving(self, number: int, step: Step, out: Compressed | None) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """What a stage gets: from the one before, or as inputs of the graph."""
        import torch

        b, n, c = step.items, step.before.tokens, step.before.width
        tokens, valid, state = self._seen.get(number, (None, torch.ones(b, n, dtype=torch.bool), {}))
        if out is None or step.fresh:
            tokens = self._given(f"tokens.{number}", b, n, c, value=tokens)
            valid = self._given(f"valid.{number}", value=valid)
        else:
            tokens, valid = out.tokens, out.valid
        if out is not None:
            state = out.state
        else:
            state = {name: self._given(f"state.{number}.{name}", value=value) for name, value in state.items()}
        self._seen.setdefault(number, (tokens, valid, state))
        return tokens, valid, state

    def sample(self) -> tuple[tuple[int, ...], float]:
        """The stages that are timed, and what their time is multiplied with: every stage, of many four that stand for a quarter each."""
        count = len(self.steps)
        if count <= MOST:
            return tuple(range(count)), 1.0
        return tuple(int((i + 0.5) * count / SOME) for i in range(SOME)), count / SOME

    def _captured(self, number: int, step: Step, need: Need, tokens: Tensor) -> Tensor:
        """What the framework hands a stage for a need."""
        from tmc_export.graphs._contract import Attention, Features, Keys, TextTower

        b, n, encoder = step.items, step.before.tokens, self.facts.encoder
        if isinstance(need, TextTower):
            return self._given(f"tower.{number}", b, need.width)
        if isinstance(need, Features):
            return self._given(f"features.{number}", b, n, encoder.width)
        if isinstance(need, Keys):
            return self._encoder_sides(number, b, n, tokens, need.layer)[1].transpose(1, 2)
        if isinstance(need, Attention):
            return self._inside(number, step, need, tokens) if step.inside else self._before(number, step, need, tokens)
        raise ValueError(f"no input for the need {need!r} of {self.name}; add one here")

    def _encoder_sides(self, number: int, b: int, n: int, tokens: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """Query and key `[b, h, n, d]` of an encoder layer; those of the layer to come are projected."""
        c, h = self.facts.encoder.width, self.facts.encoder.heads
        if layer == "previous":
            return self._given(f"query.{number}", b, h, n, c // h, scale=0.3), self._given(f"key.{number}", b, h, n, c // h)
        hidden = tokens if tokens.shape[-1] == c else self._given(f"hidden.{number}", b, n, c)
        query, key = (hidden @ self._given(f"next.{side}", c, c, scale=0.03) for side in ("query", "key"))
        return tuple(x.reshape(b, n, h, c // h).transpose(1, 2) for x in (query, key))  # type: ignore[return-value]

    def _before(self, number: int, step: Step, need: Any, tokens: Tensor) -> Tensor:
        """Scores of an encoder layer; behind the projector those of every crop's patches, side by side."""
        from tmc_export.surgery.stages import attention_scores

        b, n = step.items, step.before.tokens
        crops = step.stage.at.part == "projector"
        b, n = (CROPS, 1 + PATCHES) if crops else (b, n)
        query, key = self._encoder_sides(number, b, n, tokens, need.layer)
        scores = attention_scores(query[:, :, :1] if need.rows == "cls" else query, key, None, need)
        return scores[:, 1:].reshape(1, -1) if crops else scores

    def _inside(self, number: int, step: Step, need: Any, tokens: Tensor) -> Tensor:
        """Scores of a decoder layer over the whole prompt, its columns brought to the candidates of every item: `[b, …, n]`."""
        import torch

        from tmc_export.surgery._rows import KeySide, QuerySide, row_scores
        from tmc_export.surgery.attention import expand_heads

        d, b, n = self.facts.decoder, step.items, step.before.tokens
        visual = b * n
        total = visual + TEXT
        if need in self._summed(step):
            columns = self._given(f"sums.{number}.{self._summed(step).index(need)}", 1, total)[..., :visual].unflatten(-1, (b, n))
            return columns.movedim(-2, 1).flatten(0, 1)
        if need.layer == "previous":
            query = self._given(f"query.{number}", 1, d.heads, total, d.head_dim, scale=0.3)
            key = self._given(f"key.{number}", 1, d.kv_heads, total, d.head_dim)
        else:
            hidden = torch.cat([tokens.reshape(1, visual, d.width), self._given(f"words.{number}", 1, TEXT, d.width)], 1)
            query = hidden @ self._given("next.query", d.width, d.width, scale=0.03)
            key = hidden @ self._given("next.key", d.width, d.kv_heads * d.head_dim, scale=0.03)
            query, key = (x.reshape(1, total, -1, d.head_dim).transpose(1, 2) for x in (query, key))
        order = self._given(f"order.{number}", value=torch.arange(total)[None])  # inputs, as in a bundle: masks are no constants
        alive = self._given(f"alive.{number}", value=torch.ones(1, total, dtype=torch.bool))
        places = torch.arange(visual, total)[None]
        rows = QuerySide(query, order, alive, alive & (order >= visual), order[:, -1], places, alive[:, :TEXT])
        scores = row_scores([need], rows, KeySide(expand_heads(key, d.heads), order, alive, None))[need]
        columns = scores[..., :visual].unflatten(-1, (b, n))
        return columns.movedim(-2, 1).flatten(0, 1)

    def _summed(self, step: Step) -> tuple[Any, ...]:
        """The needs of a cut that the block before it adds up itself."""
        from tmc_export.graphs._contract import Attention
        from tmc_export.plan.sums import summed_by_block

        previous = [need for need in step.stage.needs if isinstance(need, Attention) and need.layer == "previous"]
        return summed_by_block(previous) if step.inside else ()

    def maps(self) -> list[tuple[int, int, tuple[Any, ...]]]:
        """Visual and text tokens of the timed stages' layers that add up their maps, and the sums."""
        steps = [self.steps[number] for number in self.sample()[0]]
        return [(s.items * s.before.tokens, TEXT, self._summed(s)) for s in steps if self._summed(s)]

    def save(self, folder: Path) -> None:
        """Trace, clean and write the graph, and the attention of layers that add up their maps."""
        import numpy as np
        import onnx_ir as ir
        import torch

        from tmc_export.export.capture import capture
        from tmc_export.passes.pipeline import clean, finish, specialize

        only, _ = self.sample()
        with torch.no_grad():
            self.run({})
            outputs = sorted(self.run({}, only))
        names, examples = list(self.inputs), list(self.inputs.values())

        class Graph(torch.nn.Module):
            def forward(_, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: N805
                found = self.run(dict(zip(names, tensors, strict=True)), only)
                return tuple(found[name] for name in outputs)

        label = f"{self.name}-{self.visual}"
        if maps := self.maps():
            save_pair(folder, label, maps, self.facts.decoder)
        traced = capture(
            Graph(), examples, input_names=names, output_names=[f"out/{name}" for name in outputs],
            symbols=[None] * len(names), model=torch.nn.Module(), checkpoint=_Nothing(),
        )  # fmt: skip
        given = dict(zip(names, examples, strict=True))
        fixed = [name for name in names if name.startswith(("weight.", "next."))]
        for value in [v for v in traced.graph.inputs if v.name in fixed]:  # weights, as a bundle has them: known when a session packs them
            traced.graph.inputs.remove(value)
            value.const_value = ir.tensor(given[value.name or ""].numpy(), name=value.name)
            traced.graph.register_initializer(value)
        static = specialize(clean(traced), {}, label)
        finish(static)
        ir.save(static, folder / f"{label}.onnx")
        np.savez(folder / f"{label}.npz", **{n: value.numpy() for n, value in given.items() if n not in fixed})

    def describe(self) -> dict[str, object]:
        """What the timing needs to know."""
        return {
            "name": self.name, "visual": self.visual, "repeats": self.repeats, "layers": self.layers(),
            "stages": len(self.steps), "times": self.repeats * self.sample()[1], "maps": bool(self.maps()),
        }  # fmt: skip


class _Nothing:
    """A checkpoint of no weights: those of the methods are inputs here."""

    def read(self, name: str) -> Any:
        raise KeyError(name)


def main() -> None:
    """Write the graphs of the methods named, or of all."""
    folder, chosen = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    for name in chosen:
        for visual in CASES[name].sizes:
            entry = Entry(name, visual)
            if entry.repeats == 1:  # else the graph of one picture serves
                entry.save(folder)
            print(json.dumps(entry.describe()), flush=True)


if __name__ == "__main__":
    main()
