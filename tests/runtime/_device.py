"""Bundles opened on the made-up device, and the same graphs on arrays: the engines' own ONNX files on onnxruntime, fed by numpy."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.families._small import save_small_llava, save_small_qwen2_vl
from tests.runtime._fake_cuda import FakeDriver
from tests.runtime._fake_tensorrt import compute, make_tensorrt, place_engines
from tmc_export.engine.profiles import read_profiles
from tmc_export.runtime._backend import BACKENDS, BackendOptions, Graph, Outputs
from tmc_export.runtime._host import HostMemory
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend
from tmc_export.runtime.session import Session, load

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A small model and a plan for it."""

    save: Callable[[Path], Path]
    compress: str
    inputs: str = "images: 2, text_tokens: 96, new_tokens: 64, chunk: 16"
    dtype: str = "float32"
    decode_width: int = 2
    tolerance: float = 1e-4  # against onnxruntime's own graphs: float32 sums in another order, over four layers
    codes: str = ""  # what slots hold, where it is codes


CASES = {
    "fastv": Case(save_small_llava, "{at: decoder.2, method: fastv, keep: 25%}"),  # keys and query rows of the layer before
    "pyramiddrop": Case(save_small_llava, "{at: decoder.1, method: pyramiddrop, layers: [1, 3], keep: [50%, 25%]}"),  # of the layer after
    "tokencarve": Case(save_small_llava, "{at: decoder.2, method: tokencarve, keep: 50%}"),  # rows leave the slots of earlier layers
    "fitprune": Case(save_small_llava, "{at: decoder.2, method: fitprune, delete: [0, 8, 8]}"),  # sums that a block makes of its own map
    "sparsevlm": Case(
        save_small_llava, "{at: decoder.1, method: sparsevlm, layers: [1, 3], keep: [60%, 60%]}"
    ),  # a cut before the first block, what cuts hand to later cuts, tokens that come from no place
    "voco": Case(
        save_small_llava,
        "{at: projector, method: voco, count: 5, weights: {random: 0}}",
        "images: 1, text_tokens: 96, new_tokens: 96",
        decode_width=1,
    ),  # one block; a barrier takes the picture's rows out of it
    "half": Case(
        save_small_llava,
        "{at: decoder.2, method: fastv, keep: 25%}",
        dtype="float16",
        decode_width=3,
        tolerance=0.05,  # float16 has 11 bits: 5e-4 of logits up to 10, over four layers
    ),
    "codes": Case(
        save_small_llava,
        "{at: decoder.1, method: pyramiddrop, layers: [1, 3], keep: [50%, 25%]}",
        codes="int8",
        tolerance=0.01,  # int8 slots: a code that lies half-way turns with the order of sums, a step of 1 / 127 of its head's range
    ),
    "fp8": Case(
        save_small_llava,
        "{at: decoder.1, method: pyramiddrop, layers: [1, 3], keep: [50%, 25%]}",
        codes="fp8",
        tolerance=0.05,  # the same, a step of up to 1 / 14
    ),
    "qwen": Case(save_small_qwen2_vl, "{at: decoder.2, method: fastv, keep: 50%}"),  # three rotary axes
}


def build_case(name: str, folder: Path) -> Path:
    """Build a bundle, with engine files that name their ONNX graphs."""
    import tmc_export

    case = CASES[name]
    case.save(folder / "model")
    text = (
        f"recipe: 1\nname: {name}\nmodel: {{source: ./model, dtype: {case.dtype}}}\ninputs: {{{case.inputs}}}\n"
        f"compress:\n  - {case.compress}\ntarget: {{device: cpu, runtime: onnxruntime, decode_width: {case.decode_width}}}\n"
    )
    if case.codes:
        from tests.quantize._slots import build_coded, kv, peaks

        (folder / "recipe.yaml").write_text(text, "utf-8")
        scales = peaks(folder / "model", folder / "recipe.yaml", case.codes)
        (folder / "recipe.yaml").write_text(text.replace("target:", f"quantize: {kv(case.codes)}\ntarget:"), "utf-8")
        build_coded(folder / "recipe.yaml", folder / "bundle", scales)
    else:
        (folder / "recipe.yaml").write_text(text, "utf-8")
        tmc_export.build(folder / "recipe.yaml", folder / "bundle", record=False)
    place_engines(folder / "bundle")
    return folder / "bundle"


@contextmanager
def device(driver: FakeDriver, version: str = "1.7.1.116", rtx: bool = True) -> Iterator[None]:
    """Put the made-up driver and TensorRT in the place of the real packages."""
    module = "tensorrt_rtx" if rtx else "tensorrt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "cuda.bindings.driver", driver)
        patch.setitem(__import__("sys").modules, module, make_tensorrt(driver, version, rtx))
        yield


@dataclass
class ArrayGraph:
    """A profile of an engine's graph, on arrays; as the device does, it puts zeros behind what is too short."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    inputs: tuple[str, ...] = ()

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        given = dict(feed)
        for name, shape in self.shapes.items():
            value = np.asarray(feed[name])[tuple(slice(size) for size in shape)]
            given[name] = np.zeros(shape, value.dtype)
            given[name][tuple(slice(size) for size in value.shape)] = value
        return compute(self.file, given)

    def relay(self, feed: Mapping[str, Array], fetch: Collection[str]) -> Outputs:
        found = self.run(feed)
        return Outputs({name: found[name] for name in fetch}, found)

    def step(self, feed: Mapping[str, Array], fetch: Collection[str]) -> Outputs:
        return self.relay(feed, fetch)


class ArrayBackend(HostMemory):
    """The engines' graphs on arrays."""

    name = "arrays"

    def __init__(self, folder: Path, options: BackendOptions) -> None:
        self._host = OnnxRuntimeBackend(folder, options)
        self._options = options
        self._graphs: dict[str, Graph] = {}
        for graph in read_profiles(folder):
            for profile in graph.profiles:
                name = graph.name if profile.name == "static" else f"{graph.name}_{profile.name}"
                self._graphs[f"onnx/{name}.onnx"] = ArrayGraph(folder / graph.onnx, dict(profile.shapes))

    def graph(self, file: str) -> Graph:
        return self._host.graph(file) if file in self._options.host else self._graphs[file]


@dataclass
class Said:
    """What a session answered: tokens, and the logits behind every one."""

    tokens: list[tuple[int, ...]] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    kept: list[dict[str, tuple[tuple[int, ...], ...]]] = field(default_factory=list)


def opened(bundle: Path, backend: str) -> Session:
    """Open a bundle; `arrays` is `ArrayBackend`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "arrays", ArrayBackend)
        return load(bundle, backend=backend, threads=1)


def pictures(count: int = 2) -> list[Array]:
    """Pictures of noise, of the same seed every time."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (90, 84, 3), np.uint8) for _ in range(count)]


def talk(session: Session, said: Said | None = None) -> Said:
    """Three turns: a picture and a question, a text, and another picture, with some tokens behind each."""
    said = said or Said()
    listen(session, said)
    one, two = pictures()
    session.reset()
    for images, text, tokens in (([one], "what is it", 6), ([], "and where", 4), ([two], "and this", 5)):
        answer = session.turn(images, text, max_new_tokens=tokens)
        said.tokens.append(answer.tokens)
        said.kept.append(answer.kept)
    return said


def listen(session: Session, said: Said) -> None:
    """Write down the logits of a session's decoder."""
    decoder = session.decoder
    turn, step = type(decoder).turn, type(decoder).step

    def heard_turn(*args: Any, **named: Any) -> Any:
        trace = turn(decoder, *args, **named)
        said.logits.append(trace.logits)
        return trace

    def heard_step(token: int, *, keep: bool = True) -> Array:
        logits = step(decoder, token, keep=keep)
        said.logits.append(logits.copy())
        return logits

    decoder.turn, decoder.step = heard_turn, heard_step  # type: ignore[method-assign]


def edit_records(bundle: Path, **fields: Any) -> None:
    """Change every record of `engines.json`."""
    path = bundle / "engines/engines.json"
    data = json.loads(path.read_text())
    data["engines"] = [{**record, **fields} for record in data["engines"]]
    path.write_text(json.dumps(data))
