"""`memory_tight`: floating-point weights are mapped once for all sessions, codes are held by one phase at a time; the answers stay."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tmc_export.core.errors import BundleError
from tmc_export.engine._proto import external_tensors, read_by, with_graph_inputs
from tmc_export.runtime._backend import BackendOptions, options_for
from tmc_export.runtime._mapped import MappedWeights, SharedWeights
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend

WIDTH = 768
TOKENS = {"prefill": 5, "chunk": 2, "decode": 1}
PHASES = {f"onnx/{phase}.onnx": phase for phase in TOKENS}


def write(folder: Path, kind: str) -> Path:
    """Three graphs `y = x · w + b` on one weight file.

    w is float32, float16, or int4 codes with a product in float32 behind them (`mixed`: in float16).
    """
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, WIDTH * WIDTH // 2, dtype=np.uint8)
    weight = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32)
    parts: dict[str, tuple[int, tuple[int, ...], bytes]] = {"b": (TensorProto.FLOAT, (WIDTH,), np.arange(WIDTH, dtype="<f4").tobytes())}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    if kind == "float32":
        parts["w"] = (TensorProto.FLOAT, (WIDTH, WIDTH), weight.tobytes())
    elif kind == "float16":
        parts["h"] = (TensorProto.FLOAT16, (WIDTH, WIDTH), np.repeat(weight, 2, 1)[:, :WIDTH].astype("<f2").tobytes())
        nodes.insert(0, helper.make_node("Cast", ["h"], ["w"], to=TensorProto.FLOAT))
    else:
        parts["c"] = (TensorProto.INT4, (4 * WIDTH, WIDTH), codes.tobytes() * 4)
        parts["s"] = (TensorProto.FLOAT, (4 * WIDTH // 32, WIDTH), np.full((4 * WIDTH // 32, WIDTH), 0.01, "<f4").tobytes())
        nodes = [
            helper.make_node("Concat", ["x", "x", "x", "x"], ["long"], axis=1),
            helper.make_node("DequantizeLinear", ["c", "s"], ["w"], axis=0, block_size=32),
            helper.make_node("MatMul", ["long", "w"], ["n"]),
            helper.make_node("MatMul", ["n", "head"], ["m"]),
            nodes[1],
        ]
        parts["head"] = (TensorProto.FLOAT, (WIDTH, WIDTH), (weight / WIDTH).tobytes())
        if kind == "mixed":
            parts["h"] = (TensorProto.FLOAT16, (WIDTH, WIDTH), (weight / 8).astype("<f2").tobytes())
            del parts["head"]
            nodes.insert(0, helper.make_node("Cast", ["h"], ["head"], to=TensorProto.FLOAT))
    (folder / "onnx").mkdir(parents=True)
    tensors, data = [], b""
    for name, (type_, dims, raw) in parts.items():
        data += b"\0" * (-len(data) % 4096)
        tensor = onnx.TensorProto(name=name, data_type=type_, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "all.data"), ("offset", len(data)), ("length", len(raw))):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        data += raw
    (folder / "onnx" / "all.data").write_bytes(data)
    for phase, count in TOKENS.items():
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [count, WIDTH]) for n in ("x", "y")]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        (folder / "onnx" / f"{phase}.onnx").write_bytes(model.SerializeToString())
    return folder


def backend(folder: Path, tight: bool) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(folder, BackendOptions(threads=1, int4_accuracy=1, memory_tight=tight, phases=PHASES))


def ask(made: OnnxRuntimeBackend, phase: str) -> np.ndarray:
    return made.graph(f"onnx/{phase}.onnx").run({"x": np.linspace(-1, 1, TOKENS[phase] * WIDTH, dtype=np.float32).reshape(-1, WIDTH)})["y"]


def mappings(folder: Path) -> int:
    """How often this process maps the weight file."""
    return sum(str(folder / "onnx" / "all.data") in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("kind", ["float32", "float16", "int4"])
def test_where_weights_lie(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, kind)
    found = {t.name: t for t in external_tensors(folder / "onnx" / "decode.onnx")}
    told = onnx.load(folder / "onnx" / "decode.onnx", load_external_data=False).graph.initializer
    assert set(found) == {t.name for t in told}
    for tensor in told:
        places = {e.key: e.value for e in tensor.external_data}
        mine = found[tensor.name]
        assert (mine.type, mine.dims, mine.location) == (tensor.data_type, tuple(tensor.dims), places["location"])
        assert (mine.offset, mine.length) == (int(places["offset"]), int(places["length"]))


@pytest.mark.parametrize("kind", ["float32", "float16", "int4"])
def test_the_answers_are_those_of_packed_copies(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, kind)
    tight, plain = backend(folder, True), backend(folder, False)
    for phase in ("prefill", "decode", "decode", "chunk", "prefill"):
        np.testing.assert_allclose(ask(tight, phase), ask(plain, phase), rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_floating_point_is_mapped_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, kind)
    tight = backend(folder, True)
    for phase in TOKENS:
        ask(tight, phase)
    assert mappings(folder) == 1 and set(tight._graphs) == set(PHASES), "no session is given back"
    del tight
    monkeypatch.setattr(MappedWeights, "of", lambda *_: SharedWeights({}, 0))  # the twin: each session maps the file itself
    apart = backend(folder, True)
    for phase in TOKENS:
        ask(apart, phase)
    assert mappings(folder) > (len(TOKENS) if kind == "float32" else 1), "of float16 only what is small stays mapped: the rest was widened"


def test_codes_are_held_by_one_phase(tmp_path: Path) -> None:
    folder = write(tmp_path, "int4")
    tight, plain = backend(folder, True), backend(folder, False)
    for phase in ("prefill", "decode", "chunk", "decode"):
        ask(tight, phase), ask(plain, phase)
        assert list(tight._graphs) == [f"onnx/{phase}.onnx"]
    assert set(plain._graphs) == set(PHASES)


def test_codes_stay_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without packing onnxruntime widens codes in every run."""
    asked: list[bool] = []
    right = ort.InferenceSession

    def session(model: str | bytes, options: ort.SessionOptions, **named: object) -> ort.InferenceSession:
        try:
            asked.append(options.get_session_config_entry("session.disable_prepacking") == "1")
        except RuntimeError:  # onnxruntime has no entry of that name
            asked.append(False)
        return right(model, options, **named)

    monkeypatch.setattr(ort, "InferenceSession", session)
    for kind in ("float32", "int4"):
        ask(backend(write(tmp_path / kind, kind), True), "decode")
    assert asked == [True, False]


@pytest.mark.parametrize(("kind", "free"), [("float32", set()), ("float16", {"h"}), ("int4", {"head"})])
def test_what_is_no_constant(tmp_path: Path, kind: str, free: set[str]) -> None:
    """float16 is not turned into float32 at load, the head beside codes is not packed; codes, their scales and small ones stay."""
    folder = write(tmp_path, kind)
    for tight in (True, False):
        session = backend(folder, tight).graph("onnx/decode.onnx")._session
        assert {value.name for value in session.get_overridable_initializers()} == (free if tight else set())
        assert [value.name for value in session.get_inputs()] == ["x"]


def test_inputs_written_behind_a_model(tmp_path: Path) -> None:
    graph = write(tmp_path, "int4") / "onnx" / "decode.onnx"
    tensors = [t for t in external_tensors(graph) if t.name in ("c", "head")]
    found = onnx.load_from_string(with_graph_inputs(graph.read_bytes(), tensors))
    told = [(i.name, i.type.tensor_type.elem_type, [d.dim_value for d in i.type.tensor_type.shape.dim]) for i in found.graph.input]
    assert told[0][0] == "x" and told[1:] == [(t.name, t.type, list(t.dims)) for t in tensors]
    del found.graph.input[1:]
    assert found == onnx.load(graph, load_external_data=False), "nothing else changes"
    assert read_by(graph.read_bytes(), ["DequantizeLinear"]) == {"c", "s"} and read_by(graph.read_bytes(), ["Add"]) == {"m", "b"}


def resident(file: Path) -> int:
    """KiB of a file that are in this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("also_whole", [False, True])
def test_pages_of_the_token_table_are_given_back(tmp_path: Path, also_whole: bool) -> None:
    folder = write(tmp_path, "float32")
    graphs = [folder / "onnx" / f"{phase}.onnx" for phase in ("prefill", "decode")]
    mapped = MappedWeights()
    value = mapped.of(graphs[0], rows=True).values["w"]
    if also_whole:  # the head of a model that ties it to the table
        mapped.of(graphs[1])
    before = value.numpy().copy()
    assert resident(folder / "onnx" / "all.data") >= before.nbytes >> 10
    mapped.give_back(graphs[0])
    assert (resident(folder / "onnx" / "all.data") > 0) is also_whole
    np.testing.assert_array_equal(value.numpy(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tight", [True, False])
def test_only_where_memory_is_tight_the_table_gives_back(tmp_path: Path, tight: bool) -> None:
    options = BackendOptions(threads=1, memory_tight=tight, host=frozenset({"onnx/decode.onnx"}))
    made = OnnxRuntimeBackend(write(tmp_path, "float32"), options)
    ask(made, "decode")
    assert (resident(tmp_path / "onnx" / "all.data") == 0) is tight


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_leave_before_a_phase_of_many_rows(tmp_path: Path) -> None:
    folder = write(tmp_path, "float32")
    made, data = backend(folder, True), folder / "onnx" / "all.data"
    for phase, left in (("decode", True), ("chunk", False), ("decode", True), ("prefill", False)):
        ask(made, "decode")
        made.graph(f"onnx/{phase}.onnx")  # before it runs; a new session reads the bias
        assert (resident(data) >= WIDTH * WIDTH * 4 >> 10) is left
    ask(made, "prefill")
    made.graph("onnx/prefill.onnx")
    assert resident(data) < WIDTH * WIDTH * 4 >> 10, "a second prompt is another run"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_leave_before_a_prompt_s_first_graph(tmp_path: Path) -> None:
    """Else the head, which the last prompt has read, lies beside the rows of the token table, or beside a picture's activations."""
    folder = write(tmp_path, "float32")
    data = folder / "onnx" / "all.data"
    for name in ("picture", "table"):
        (folder / "onnx" / f"{name}.onnx").write_bytes((folder / "onnx" / "prefill.onnx").read_bytes())
    phases = {**PHASES, "onnx/table.onnx": "prefill"}
    made = OnnxRuntimeBackend(folder, BackendOptions(threads=1, memory_tight=True, phases=phases))
    for name in ("table", "picture"):
        made.graph(f"onnx/{name}.onnx")
        ask(made, "decode")
        assert resident(data) >= WIDTH * WIDTH * 4 >> 10
        made.graph(f"onnx/{name}.onnx")
        assert resident(data) < WIDTH * WIDTH * 4 >> 10


def test_the_table_s_graphs_have_phases(tmp_path: Path) -> None:
    phases = {name: SimpleNamespace(file=f"{name}.onnx") for name in TOKENS}
    table = {name: SimpleNamespace(file=f"embed_{name}.onnx") for name in TOKENS}
    program: Any = SimpleNamespace(blocks=[SimpleNamespace(phases=phases)], memory_tight=True, embed=table)
    assert options_for(program).phases == {f"{kind}{name}.onnx": name for kind in ("", "embed_") for name in TOKENS}


def write_chain(folder: Path) -> Path:
    """A graph in float16: four products, each behind a norm that onnxruntime fuses."""
    rng, nodes, last = np.random.default_rng(0), [], "x"
    tensors = [
        helper.make_tensor("two", TensorProto.FLOAT, [], [2.0]), helper.make_tensor("eps", TensorProto.FLOAT, [], [1e-5]),
        helper.make_tensor("ones", TensorProto.FLOAT, [WIDTH], np.ones(WIDTH)),
    ]  # fmt: skip
    (folder / "onnx").mkdir(parents=True)
    with (folder / "onnx" / "all.data").open("wb") as data:
        for n in range(4):
            raw = (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype("<f2").tobytes()
            tensor = onnx.TensorProto(name=f"w{n}", data_type=TensorProto.FLOAT16, dims=(WIDTH, WIDTH), data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "all.data"), ("offset", data.tell()), ("length", data.write(raw))):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            steps = [
                ("Cast", [last], "wide"), ("Pow", ["wide", "two"], "square"), ("ReduceMean", ["square"], "mean"),
                ("Add", ["mean", "eps"], "safe"), ("Sqrt", ["safe"], "root"), ("Div", ["wide", "root"], "norm"),
                ("Mul", ["norm", "ones"], "scaled"), ("Cast", ["scaled"], "half"), ("MatMul", ["half", f"w{n}"], "y"),
            ]  # fmt: skip
            inner = {name for _, _, name in steps}
            for kind, ends, name in steps:
                kwargs = {"to": TensorProto.FLOAT if name == "wide" else TensorProto.FLOAT16} if kind == "Cast" else {}
                source = [f"{end}{n}" if end in inner else end for end in ends]
                nodes.append(helper.make_node(kind, source, [f"{name}{n}"], **kwargs))
            last = f"y{n}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [5, WIDTH]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    (folder / "onnx" / "prefill.onnx").write_bytes(model.SerializeToString())
    return folder


def profile(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every session from now on write down what it runs."""
    right = ort.InferenceSession

    def session(model: str | bytes, options: ort.SessionOptions, **named: object) -> ort.InferenceSession:
        options.enable_profiling, options.profile_file_prefix = True, str(prefix)
        return right(model, options, **named)

    monkeypatch.setattr(ort, "InferenceSession", session)


def kernels(session: ort.InferenceSession) -> list[Any]:
    """What a profiled session has run."""
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return [e for e in events if e["name"].endswith("_kernel_time")]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_weight_is_widened_before_its_product(tmp_path: Path, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 one weight at a time is float32; the twin is onnxruntime's own order, in which it is more."""
    folder = write_chain(tmp_path / "bundle")
    of = MappedWeights.of
    profile(tmp_path / "profile", monkeypatch)
    if not ordered:
        monkeypatch.setattr(MappedWeights, "of", lambda *given: replace(of(*given), widens=False))
    graph = backend(folder, True).graph("onnx/prefill.onnx")
    graph.run({"x": np.ones((5, WIDTH), np.float16)})
    done = sorted((e["ts"], e["args"]["op_name"], int(e["args"]["output_size"])) for e in kernels(graph._session))
    big = [kind for _, kind, size in done if size >= WIDTH * WIDTH * 4]
    wide = most = 0
    for _, kind, size in done:
        wide += (kind == "Cast" and size >= WIDTH * WIDTH * 4) - (kind in ("MatMul", "Gemm"))
        most = max(most, wide)
    assert big == ["Cast"] * 4 and (most == 1) is ordered


@pytest.mark.parametrize("codes", [True, False])
def test_codes_beside_float16_stay_codes(tmp_path: Path, codes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without onnxruntime's fusions, which float16 alone is better off without, codes are widened in every run; the twin does it."""
    of = MappedWeights.of
    profile(tmp_path / "profile", monkeypatch)
    if not codes:
        monkeypatch.setattr(MappedWeights, "of", lambda *given: replace(of(*given), codes=False))
    folder = write(tmp_path / "bundle", "mixed")
    made = backend(folder, True)
    got = ask(made, "decode")
    ran = {e["args"]["op_name"] for e in kernels(made.graph("onnx/decode.onnx")._session)}
    assert ("MatMulNBits" in ran, "DequantizeLinear" in ran, "Cast" in ran) == (codes, not codes, True)
    np.testing.assert_allclose(got, ask(backend(folder, False), "decode"), rtol=1e-5, atol=1e-3)


def test_a_weight_file_that_is_cut_short(tmp_path: Path) -> None:
    folder = write(tmp_path, "float32")
    data = folder / "onnx" / "all.data"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(BundleError, match="all.data ends before the weight 'w' does; copy the bundle again"):
        backend(folder, True).graph("onnx/decode.onnx")
    data.unlink()
    with pytest.raises(BundleError, match="cannot read the weight file .*all.data"):
        backend(folder, True).graph("onnx/decode.onnx")


def test_a_weight_file_outside_of_the_bundle_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", "float32")
    (folder / "onnx" / "all.data").rename(tmp_path / "all.data")
    graph = folder / "onnx" / "decode.onnx"
    for outside in ("../../all.data", str(tmp_path / "all.data")):
        model = onnx.load(graph, load_external_data=False)
        for tensor in model.graph.initializer:
            next(e for e in tensor.external_data if e.key == "location").value = outside
        graph.write_bytes(model.SerializeToString())
        with pytest.raises(BundleError, match=r"the graph decode.onnx of .*all.data', which leaves the bundle"):
            backend(folder, True).graph("onnx/decode.onnx")
