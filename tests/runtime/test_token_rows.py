"""A token's row in a decode step: read where the file is mapped, and exactly what the graph returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tmc_export.core.errors import BundleError
from tmc_export.engine._proto import gathered_table
from tmc_export.runtime._backend import BackendOptions
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend
from tmc_export.runtime._token_rows import TokenRows

FILE, TOKENS, WIDTH, BEFORE = "onnx/embed_decode.onnx", 11, 8, 64
TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}
OTHER = {np.int8: TensorProto.INT8}


def write(folder: Path, dtype: type = np.float32, kind: str = "gather") -> np.ndarray:
    """A token table's graph, or one that is nearly that; returns the table."""
    table = (9 * np.random.default_rng(0).standard_normal((TOKENS, WIDTH))).astype(dtype)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "embed.data").write_bytes(b"\1" * BEFORE + table.tobytes())
    kinds, dims = TYPES | OTHER, (table.size,) if kind == "vector" else table.shape
    weight = onnx.TensorProto(name="table", data_type=kinds[dtype], dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "embed.data"), ("offset", BEFORE), ("length", table.nbytes)):
        weight.external_data.add(key=key, value=str(value))
    nodes = {
        "gather": [helper.make_node("Gather", ["table", "input_ids"], ["hidden"], axis=0)],
        "no axis": [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])],
        "columns": [helper.make_node("Gather", ["table", "input_ids"], ["hidden"], axis=1)],
        "scaled": [helper.make_node("Gather", ["table", "input_ids"], ["x"]), helper.make_node("Add", ["x", "x"], ["hidden"])],
        "vector": [helper.make_node("Gather", ["table", "input_ids"], ["hidden"])],
        "index": [helper.make_node("Gather", ["input_ids", "table"], ["hidden"])],
        "elements": [helper.make_node("GatherElements", ["table", "input_ids"], ["hidden"])],
    }[kind]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, 1])]
    outputs = [helper.make_tensor_value_info("hidden", kinds[dtype], [1, 1, WIDTH] if kind == "scaled" else None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / FILE)
    return table


def backend(folder: Path, tight: bool = False) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(folder, BackendOptions(threads=1, memory_tight=tight, phases={FILE: "decode"}, host=frozenset({FILE})))


@pytest.mark.parametrize("tight", [False, True], ids=["fast", "tight"])
@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("kind", ["gather", "no axis"])
def test_a_step_gives_what_the_graph_gives(tmp_path: Path, dtype: type, kind: str, tight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write(tmp_path, dtype, kind)
    made, opened = backend(tmp_path, tight), list[str]()
    session = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda path, *a, **k: opened.append(str(path)) or session(path, *a, **k))
    graph = made.graph(FILE)
    assert isinstance(graph, TokenRows) and made.graph(FILE) is graph and graph.inputs == ("input_ids",)
    stepped = []
    for token in range(TOKENS):
        out = graph.step({"input_ids": np.full((1, 1), token)}, ("hidden",))
        assert out.held["hidden"] is out.arrays["hidden"] is graph.step({"input_ids": np.full((1, 1), token)}, ()).arrays["hidden"]
        stepped.append(out.arrays["hidden"].copy())
    assert not opened  # no session so far
    for token, got in enumerate(stepped):
        want = graph.run({"input_ids": np.full((1, 1), token)})["hidden"]
        assert got.dtype == want.dtype == dtype and got.shape == (1, 1, WIDTH) and len(opened) == 1
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got, graph.relay({"input_ids": np.full((1, 1), token)}, ("hidden",)).arrays["hidden"])
    np.testing.assert_array_equal(np.concatenate(stepped)[:, 0], table)
    assert len(np.unique(table, axis=0)) == TOKENS  # another token has another row


@pytest.mark.parametrize("kind", ["columns", "scaled", "vector", "index", "elements"])
def test_a_graph_that_does_more_is_a_session(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind=kind)
    assert gathered_table(tmp_path / FILE) is None and backend(tmp_path)._token_rows(FILE) is None


def test_a_table_of_codes_is_a_session(tmp_path: Path) -> None:
    table = write(tmp_path, np.int8)
    graph = backend(tmp_path).graph(FILE)
    assert not isinstance(graph, TokenRows)
    for token in (3, 7):
        np.testing.assert_array_equal(graph.run({"input_ids": np.full((1, 1), token)})["hidden"][0, 0], table[token])


def test_a_table_with_something_behind_it_steps_as_a_session(tmp_path: Path) -> None:
    table = write(tmp_path, kind="scaled")
    graph = backend(tmp_path).graph(FILE)
    for token in (3, 7):
        np.testing.assert_array_equal(
            graph.step({"input_ids": np.full((1, 1), token)}, ("hidden",)).arrays["hidden"][0, 0], 2 * table[token]
        )


def test_a_damaged_graph_is_a_bundle_error_or_told_by_onnxruntime(tmp_path: Path) -> None:
    """Whatever byte of it is another, or how much of it is missing."""
    write(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    damaged = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(len(whole))]
    refused = 0
    for data in (*damaged, *(whole[:length] for length in range(len(whole)))):
        (tmp_path / FILE).write_bytes(data)
        for tight in (False, True):
            try:
                backend(tmp_path, tight).graph(FILE)
            except BundleError:
                refused += 1
    assert refused > len(whole)


def test_a_table_of_another_width_than_its_bytes_is_not_read(tmp_path: Path) -> None:
    write(tmp_path)
    model = onnx.load(tmp_path / FILE, load_external_data=False)
    model.graph.initializer[0].dims[1] = WIDTH // 2
    (tmp_path / FILE).write_bytes(model.SerializeToString())
    assert backend(tmp_path)._token_rows(FILE) is None


def test_only_the_decode_steps_table_is_read_so(tmp_path: Path) -> None:
    write(tmp_path)
    for options in (
        BackendOptions(1, phases={FILE: "prefill"}, host=frozenset({FILE})),
        BackendOptions(1, phases={FILE: "decode"}),
        BackendOptions(1, host=frozenset({FILE})),
    ):
        assert not isinstance(OnnxRuntimeBackend(tmp_path, options).graph(FILE), TokenRows)


@pytest.mark.parametrize("token", [-1, TOKENS])
def test_a_token_without_a_row_is_refused(tmp_path: Path, token: int) -> None:
    write(tmp_path)
    with pytest.raises(BundleError, match=rf"embed_decode\.onnx has rows for {TOKENS} tokens, none for token {token}"):
        backend(tmp_path).graph(FILE).step({"input_ids": np.full((1, 1), token)}, ("hidden",))


def test_a_table_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    data = tmp_path / "onnx" / "embed.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"embed\.data ends before the weight 'table' does; copy the bundle again"):
        backend(tmp_path).graph(FILE)


def test_where_memory_is_tight_pages_are_given_back_after_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    for tight, times in ((False, 0), (True, 2)):
        made, given = backend(tmp_path, tight), list[Path]()
        monkeypatch.setattr(made._mapped, "give_back", given.append)
        for token in (1, 2):
            made.graph(FILE).step({"input_ids": np.full((1, 1), token)}, ("hidden",))
        assert given == [tmp_path / FILE] * times
