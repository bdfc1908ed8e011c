"""What TensorRT-RTX's parser or builder refuses is found; nothing is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("polygraphy")

from onnx import helper, numpy_helper  # noqa: E402

from tests._tiny import tmc  # noqa: E402
from tests.debug._graphs import operators  # noqa: E402

DECODE, CUT = "onnx/block_1_decode.onnx", "onnx/compress_1.onnx"


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")


def debug(bundle: Path, check: str, *args: object) -> tuple[int, dict[str, Any]]:
    target = bundle.parent / "fault"
    ran = tmc("debug", bundle, "--check", check, "-o", target, *args)
    if ran.code == 0:
        assert ran.out.startswith("nothing fails")
        return 0, {}
    ran.error()
    return ran.code, {**json.loads((target / "fault.json").read_text()), "operators": operators(onnx.load(target / "model.onnx"))}


def test_a_whole_bundle_is_parsed(rtx: None, bundle: Path) -> None:
    assert debug(bundle, "parse")[0] == 0


def test_onnxruntimes_attention_is_refused_and_found(rtx: None, bundle: Path) -> None:
    code, told = debug(bundle, "parse", "--subgraph", DECODE)
    assert code == 4 and told["kind"] == "parse" and told["operators"] == ["GroupQueryAttention"]
    assert told["node"]["operator"] == "com.microsoft::GroupQueryAttention" and "GroupQueryAttention" in told["why"]
    assert told["reproduce"].startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert ")


def test_an_operator_put_into_a_block_is_found_in_its_symbolic_graph(rtx: None, bundle: Path) -> None:
    path = bundle / "engines" / "block_1.onnx"
    model = onnx.load(path, load_external_data=False)
    root = next(n for n in model.graph.node if n.op_type == "Sqrt")
    root.domain, root.op_type = "com.microsoft", "QuickGelu"
    path.write_bytes(model.SerializeToString())
    code, told = debug(bundle, "parse")
    assert code == 4 and told["subgraph"] == "engines/block_1.onnx" and told["operators"] == ["QuickGelu"]


def test_what_parses_and_cannot_be_built(rtx: None, bundle: Path) -> None:
    """TopK beyond 3840 is refused by the builder only."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["a"], name="abs"), helper.make_node("TopK", ["a", "k"], ["v", "i"], name="topk"),
         helper.make_node("Neg", ["v"], ["y"], name="neg")],
        "g", [info("x", 1, [1, 4000])], [info("y", 1, [1, 3900])], [numpy_helper.from_array(np.array([3900]), "k")],
        value_info=[info("a", 1, [1, 4000]), info("v", 1, [1, 3900]), info("i", 7, [1, 3900])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), bundle / CUT)
    assert debug(bundle, "parse", "--subgraph", CUT)[0] == 0
    code, told = debug(bundle, "build", "--subgraph", CUT)
    assert code == 4 and told["kind"] == "build" and told["operators"] == ["TopK"]


@pytest.mark.slow
def test_a_whole_bundle_is_built(rtx: None, bundle: Path) -> None:
    assert debug(bundle, "build")[0] == 0
