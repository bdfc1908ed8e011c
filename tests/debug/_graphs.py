"""Small ONNX graphs, written to a folder with their weights beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Node = tuple[str, list[str], list[str]]


def graph(nodes: Sequence[Node], inputs: Sequence[str], outputs: Sequence[str], size: int = 4, weights: Sequence[str] = ()) -> Any:
    """A graph of float tensors `[size]`; a node is (operator, inputs, outputs), `domain::operator` for another domain."""
    draw = np.random.default_rng(0)
    made = []
    for number, (operator, reads, gives) in enumerate(nodes):
        domain, _, name = operator.rpartition("::")
        made.append(helper.make_node(name, reads, gives, name=f"n{number}_{name}", domain=domain))

    def info(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [size])

    model = helper.make_graph(
        made,
        "g",
        [info(n) for n in inputs],
        [info(n) for n in outputs],
        [numpy_helper.from_array(draw.uniform(0.5, 1.5, size).astype(np.float32), w) for w in weights],
        value_info=[info(n) for _, _, gives in nodes for n in gives if n not in outputs],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(model, opset_imports=opsets, ir_version=10)


BRANCHES: list[Node] = [
    ("Abs", ["x"], ["a"]), ("Sqrt", ["a"], ["b"]), ("Neg", ["x"], ["side"]), ("Exp", ["b"], ["c"]), ("Tanh", ["side"], ["d"]),
    ("Mul", ["c", "w"], ["e"]), ("Sigmoid", ["e"], ["f"]), ("Add", ["d", "f"], ["g"]), ("Floor", ["g"], ["h"]), ("Relu", ["g"], ["y"]),
]  # fmt: skip
"""Two branches from `x` that meet in `g`; outputs `y` and `h`."""


def branches() -> Any:
    return graph(BRANCHES, ["x"], ["y", "h"], weights=["w"])


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def save(model: Any, path: Path, data: str | None = None) -> Path:
    """Write a model, with its weights in `data` beside it if that is named."""
    options: dict[str, Any] = {}
    if data is not None:
        options = {"save_as_external_data": True, "location": data, "size_threshold": 0}
    onnx.save(model, path, **options)
    return path
