"""Small real ONNX graphs: attention blocks symbolic in T (new tokens) and P (past slots), and bundles of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

LAYERS, HEADS = 2, 4


@dataclass(frozen=True)
class Block:
    path: Path
    width: int
    weight_bytes: int

    def shapes(self, new: int, past: int) -> dict[str, list[int]]:
        shapes = {"hidden": [1, new, self.width], "mask": [1, 1, new, new + past]}
        for layer in range(LAYERS):
            shapes |= {f"past_{kind}{layer}": [1, HEADS, past, self.width // HEADS] for kind in "kv"}
        return shapes

    def profiles(self, decode: int = 2) -> list[dict[str, object]]:
        prefill = {"name": "prefill", "shapes": self.shapes(128, 0)}
        return [prefill, {"name": "decode", "shapes": self.shapes(decode, 256)}]


def _layer(layer: int, hidden: str, width: int) -> list[object]:
    from onnx import helper

    def node(kind: str, inputs: list[str], output: str, **attributes: object) -> object:
        return helper.make_node(kind, inputs, [p + output], name=p + output, **attributes)

    p = f"l{layer}."
    nodes = []
    for kind in "qkv":
        nodes += [
            node("MatMul", [hidden, p + "w" + kind], kind + "1"),
            node("Reshape", [p + kind + "1", "split"], kind + "2"),
            node("Transpose", [p + kind + "2"], "new_" + kind, perm=[0, 2, 1, 3]),
        ]
    nodes += [node("Concat", [f"past_{kind}{layer}", p + "new_" + kind], kind + "_all", axis=2) for kind in "kv"]
    return [
        *nodes,
        node("Mul", [p + "new_q", "scale"], "scaled"),
        node("Transpose", [p + "k_all"], "k_t", perm=[0, 1, 3, 2]),
        node("MatMul", [p + "scaled", p + "k_t"], "scores"),
        node("Add", [p + "scores", "mask"], "masked"),
        node("Softmax", [p + "masked"], "probabilities", axis=-1),
        node("MatMul", [p + "probabilities", p + "v_all"], "mixed"),
        node("Transpose", [p + "mixed"], "mixed_t", perm=[0, 2, 1, 3]),
        node("Reshape", [p + "mixed_t", "join"], "joined"),
        node("MatMul", [p + "joined", p + "wo"], "out"),
        node("Add", [hidden, p + "out"], "y"),
    ]


def make_block(path: Path, *, width: int = 256, half: bool = True, expose: bool = False, data: str = "block_0.data") -> Block:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    dtype, kind = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    rng, depth = np.random.default_rng(0), width // HEADS

    def value(name: str, *shape: object) -> object:
        return helper.make_tensor_value_info(name, kind, list(shape))

    weights = {
        "split": np.array([0, 0, HEADS, depth], np.int64),
        "join": np.array([0, 0, width], np.int64),
        "scale": np.array(depth**-0.5, dtype),
    }
    inputs, outputs = [value("hidden", 1, "T", width), value("mask", 1, 1, "T", "S")], [value(f"l{LAYERS - 1}.y", 1, "T", width)]
    nodes: list[object] = []
    for layer in range(LAYERS):
        nodes += _layer(layer, f"l{layer - 1}.y" if layer else "hidden", width)
        weights |= {f"l{layer}.w{name}": (rng.standard_normal((width, width)) / 16).astype(dtype) for name in "qkvo"}
        inputs += [value(f"past_{name}{layer}", 1, HEADS, "P", depth) for name in "kv"]
        outputs += [value(f"l{layer}.new_{name}", 1, HEADS, "T", depth) for name in "kv"]
        outputs += [value(f"l{layer}.probabilities", 1, HEADS, "T", "S")] if expose else []
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "block", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=1024)
    return Block(path, width, sum(array.nbytes for array in weights.values()))


def make_int4(path: Path, *, width: int = 256, block: int = 32) -> None:
    """A linear layer whose weights are int4 with one scale per `block` input channels (opset 21)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, width * width // 2, dtype=np.uint8).tobytes()
    weight = helper.make_tensor("weight", TensorProto.INT4, [width, width], packed, raw=True)
    scale = numpy_helper.from_array(np.full((width // block, width), 0.01, np.float16), "scale")
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"], axis=0, block_size=block),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 16, width]) for name in "xy"]
    graph = helper.make_graph(nodes, "int4", ends[:1], ends[1:], [weight, scale])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def make_static(path: Path, kind: str = "Relu") -> None:
    """One node on a static input `[2, 8]`; `NonZero` is one that TensorRT refuses."""
    import onnx
    from onnx import TensorProto, helper

    output = TensorProto.INT64 if kind == "NonZero" else TensorProto.FLOAT
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8]), helper.make_tensor_value_info("y", output, None)]
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"], name="the_node")], "static", ends[:1], ends[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle: one block whose engine graph names its weights `../onnx/block_0.data`, and one static graph."""
    import onnx

    folder = tmp_path / "bundle"
    block = make_block(folder / "onnx/block_0.onnx")
    model = onnx.load(block.path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../onnx/" + entry.value
    (folder / "engines").mkdir()
    onnx.save(model, folder / "engines/block_0.onnx")
    make_static(folder / "onnx/vision_0.onnx")
    subgraphs = [
        {"name": "block_0", "onnx": "engines/block_0.onnx", "precision": "float16", "profiles": block.profiles()},
        {"name": "vision_0", "onnx": "onnx/vision_0.onnx", "precision": "float16", "profiles": [{"name": "static", "shapes": {}}]},
    ]
    (folder / "engines/profiles.json").write_text(json.dumps({"subgraphs": subgraphs}))
    (folder / "manifest.json").write_text(_manifest())
    return folder


def _manifest() -> str:
    """A manifest that says of its bundle nothing but that it is one."""
    from tmc_export.bundle.manifest import Manifest
    from tmc_export.bundle.program import Program

    program = Program(
        family="none", dtype="float16", batch=1, images=0, width=1, vocabulary=1, heads=1, kv_heads=1, head_dim=1, rope_axes=1,
        position_rule="sequential", text_tokens=1, new_tokens=1, chunk=1, turns="freeze", image_token=0, image_text="", eos=(), vision=(),
        embed={}, blocks=(), cuts=(),
    )  # fmt: skip
    return Manifest(name="test", key="", recipe={}, plan={}, checkpoint={}, versions={}, program=program).model_dump_json()


@pytest.fixture
def graphs() -> tuple[Callable[..., Block], Callable[..., None], Callable[..., None]]:
    """`make_block`, `make_int4`, `make_static`."""
    return make_block, make_int4, make_static


@pytest.fixture
def fake_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a module of one's own in the worker's way: `fake_module("tensorrt_rtx", "raise ImportError('gone')")`."""

    def place(name: str, source: str) -> None:
        folder = tmp_path / "fakes"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return place
