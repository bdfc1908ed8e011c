"""One weight file per part, each tensor once, aligned; graphs that refer to it compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from tests.passes._models import graph
from tmc_export.export.lazy_tensors import KeyedTensor, derive
from tmc_export.export.store import WeightStore

TEXT = "(float[2, 64] x) => (float[2, 512] y) { y = MatMul(x, w) }"
W = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)


def place(model: ir.Model, name: str = "w") -> tuple[str, int, int]:
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return str(tensor.location), int(tensor.offset or 0), int(tensor.length or 0)


def keyed(key: str, array: np.ndarray, reads: list[str]) -> KeyedTensor:  # type: ignore[type-arg]
    def load() -> ir.TensorProtocol:
        reads.append(key)
        return ir.tensor(array, name="w")

    return KeyedTensor(key, load, ir.DataType.FLOAT, array.shape, "w")


def test_two_graphs_share_one_place(tmp_path: Path) -> None:
    store, models = WeightStore(tmp_path), [graph(TEXT, w=W), graph(TEXT, w=W)]
    assert [store.externalize(m, "a.data") for m in models] == [W.nbytes, 0]
    assert place(models[0]) == place(models[1]) == ("a.data", 0, W.nbytes)
    assert (tmp_path / "a.data").read_bytes() == W.tobytes()
    for model in models:
        ir.save(model, tmp_path / "m.onnx")
        session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": X})[0], X @ W, rtol=1e-4, atol=1e-4)


def test_another_tensor_is_another_place_and_aligned(tmp_path: Path) -> None:
    store, first, second = WeightStore(tmp_path), graph(TEXT, w=W[:, :500].copy()), graph(TEXT, w=W)
    store.externalize(first, "a.data")
    store.externalize(second, "a.data")
    _, offset, length = place(second)
    assert offset % 4096 == 0 and offset >= W[:, :500].nbytes and length == W.nbytes
    assert (tmp_path / "a.data").read_bytes()[offset:] == W.tobytes()


def test_keys_say_what_is_equal_and_a_tensor_is_read_once(tmp_path: Path) -> None:
    store, reads = WeightStore(tmp_path), list[str]()
    models = [graph(TEXT, w=W) for _ in range(3)]
    for model, key in zip(models, ["k", "k", "other"], strict=True):
        model.graph.initializers["w"].const_value = keyed(key, W, reads)
        store.externalize(model, "a.data")
    assert reads == ["k", "other"]
    assert place(models[0]) == place(models[1]) != place(models[2])


def test_small_tensors_stay_in_the_graph(tmp_path: Path) -> None:
    store, reads, model = WeightStore(tmp_path), list[str](), graph(TEXT, w=W)
    small = np.ones((4, 4), np.float32)
    model.graph.initializers["w"].const_value = keyed("k", small, reads)
    assert store.externalize(model, "a.data") == 0 and not (tmp_path / "a.data").exists()
    tensor = model.graph.initializers["w"].const_value
    assert not isinstance(tensor, (KeyedTensor, ir.ExternalTensor)) and tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), small)


def test_derived_tensors_are_computed_when_asked_and_keyed_by_how(tmp_path: Path) -> None:
    reads: list[str] = []
    source = keyed("k", W, reads)
    turned = derive(source, "transpose(1, 0)", np.transpose, shape=(512, 64), name="t")
    assert reads == [] and turned.key == "k|transpose(1, 0)" != source.key
    np.testing.assert_array_equal(turned.numpy(), W.T)
    turned.numpy()
    assert reads == ["k", "k"]  # nothing is kept in memory
