"""The small reader of ONNX files agrees with the `onnx` package."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmc_export.core.errors import BundleError
from tmc_export.engine._proto import read_graph, with_plain_locations


def test_facts_are_those_of_onnx(tmp_path: Path, graphs) -> None:
    import onnx

    block = graphs[0](tmp_path / "block.onnx")
    facts, model = read_graph(block.path), onnx.load(block.path, load_external_data=False)
    assert facts.opset == 20 and facts.locations == ("block_0.data",) and facts.bytes == block.path.stat().st_size
    assert facts.operators == tuple(sorted({node.op_type for node in model.graph.node}))
    for mine, theirs in zip(facts.inputs, model.graph.input, strict=True):
        dims = tuple(dim.dim_param or dim.dim_value for dim in theirs.type.tensor_type.shape.dim)
        assert (mine.name, mine.dims) == (theirs.name, dims) and not mine.static


def test_locations_lose_their_folder_and_nothing_else_changes(bundle: Path) -> None:
    import onnx

    original = (bundle / "engines/block_0.onnx").read_bytes()
    wanted = onnx.load_from_string(original)
    for tensor in wanted.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                assert entry.value == "../onnx/block_0.data"
                entry.value = "block_0.data"
    changed = with_plain_locations(original)
    assert onnx.load_from_string(changed) == wanted != onnx.load_from_string(original)
    assert with_plain_locations(changed) == changed


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_damaged_file_is_refused(tmp_path: Path, graphs, cut: int) -> None:
    graphs[2](tmp_path / "g.onnx")
    whole = (tmp_path / "g.onnx").read_bytes()
    (tmp_path / "bad.onnx").write_bytes(whole[:cut] if cut < len(whole) else b"\xff" * 20)
    with pytest.raises(BundleError, match=r"bad\.onnx"):
        read_graph(tmp_path / "bad.onnx")
