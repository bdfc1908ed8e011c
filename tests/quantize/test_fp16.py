"""fp16: a float32 bundle with float16 weights, and values that float16 cannot hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.quantize._reading import checkpoint, graphs
from tmc_export.core.errors import ModelError
from tmc_export.quantize.fp16 import to_half
from tmc_export.runtime.session import load

ALL = "encoder: {weights: fp16}, projector: {weights: fp16}, decoder: {weights: fp16, keep: [o_proj]}, head: {weights: fp16}"


@pytest.fixture(scope="module")
def half(build) -> Path:
    return build("half", ALL)


def weights_read(graph: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Name of a matrix → what is stored, for every product and look-up."""
    found = {}
    for node in graph.graph:
        place = {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type)
        value = node.inputs[place] if place is not None else None
        if value is not None and value.producer() is not None and value.producer().op_type == "Cast":
            value = value.producer().inputs[0]
        if value is not None and value.is_initializer() and len(value.const_value.shape) == 2:
            found[value.name] = value.const_value
    return found


def test_every_matrix_is_stored_in_half_and_rounds_to_nearest(half: Path, plain: Path) -> None:
    ours, theirs = graphs(half), graphs(plain)
    assert ours.keys() == theirs.keys()
    seen = 0
    for file, graph in ours.items():
        if file.startswith("compress"):
            continue
        stored, exact = weights_read(graph), weights_read(theirs[file])
        assert {n.replace(".fp16", "") for n in stored} == set(exact)
        for name, tensor in stored.items():
            if "o_proj" in name:
                assert tensor.dtype == ir.DataType.FLOAT and np.array_equal(tensor.numpy(), exact[name].numpy())
                continue
            assert tensor.dtype == ir.DataType.FLOAT16, (file, name)
            assert np.array_equal(tensor.numpy(), exact[name.replace(".fp16", "")].numpy().astype(np.float16))
            seen += 1
    assert seen > 20


def test_compress_graphs_keep_float32(half: Path, plain: Path) -> None:
    for file, graph in graphs(half, "compress").items():
        assert not any(v.const_value.dtype == ir.DataType.FLOAT16 for v in graph.graph.initializers.values())
        assert [n.op_type for n in graph.graph] == [n.op_type for n in graphs(plain, "compress")[file].graph]


def test_it_is_half_the_size_and_inputs_stay_float32(half: Path, plain: Path) -> None:
    for name in ("block_0.data", "embed.data"):
        kept = 64 * 64 * 4 if name.startswith("block") else 0  # o_proj
        small, large = (b / "onnx" / name for b in (half, plain))
        assert small.stat().st_size - kept <= 0.51 * (large.stat().st_size - kept) + 4096
    for name, graph in graphs(half).items():
        values = [*graph.graph.inputs, *graph.graph.outputs]
        assert not any(v.dtype == ir.DataType.FLOAT16 for v in values), name


def test_the_engine_room_is_told_that_they_are_widened(half: Path, plain: Path) -> None:
    """Compress graphs and the twin hold float32."""
    told = [
        {s["name"]: s["precision"] for s in json.loads((b / "engines/profiles.json").read_text("utf-8"))["subgraphs"]}
        for b in (half, plain)
    ]
    assert told[0].keys() == told[1].keys() and set(told[1].values()) == {"float32"}
    assert {name: kind for name, kind in told[0].items() if not name.startswith("compress")} == {
        name: "widened" for name in told[0] if not name.startswith("compress")
    }
    assert {kind for name, kind in told[0].items() if name.startswith("compress")} == {"float32"}


def test_it_answers_as_float32_does_within_float16(half: Path, plain: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (42, 42, 3), np.uint8)
    logits = []
    for bundle in (half, plain):
        session = load(bundle, threads=1)
        ids = [1, session.program.image_token, 5, 6, 7]
        logits.append(session.run_prompt(session.prompt(ids, session.encode_images([picture]))).logits)
    scale = np.abs(logits[1]).max()
    error = np.abs(logits[0] - logits[1]).max() / scale
    assert 0 < error < 1e-2  # weights rounded to 2^-11, some twenty products in a row


@pytest.mark.parametrize("value", [1e5, -7e4, np.inf, np.nan])
def test_a_value_beyond_float16_is_refused(value: float) -> None:
    weight = np.full((4, 4), 0.5, np.float32)
    weight[1, 2] = value
    with pytest.raises(ModelError, match=r"tensor 'a\.b\.weight' holds .*, above float16's 65504; .*keep: \[a\.b\]"):
        to_half("a.b.weight", weight)
    weight[1, 2] = 65504
    assert to_half("a.b.weight", weight).dtype == np.float16


@pytest.mark.parametrize(("value", "fine"), [(1e5, False), (6e4, True)])
def test_a_bfloat16_checkpoint_that_overflows_float16_is_refused(model: Path, tmp_path: Path, value: float, fine: bool) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from tmc_export.export.checkpoint import open_checkpoint
    from tmc_export.export.skeleton import make_skeleton
    from tmc_export.surgery.attention import register_attention

    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = {n: torch.from_numpy(a).to(torch.bfloat16) for n, a in checkpoint(folder).items()}
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    whole = make_skeleton(AutoConfig.from_pretrained(folder), torch.float16, register_attention())
    opened = open_checkpoint(folder, whole)
    (key,) = (n for n in opened.sources if opened.identity(n) == name)
    if fine:
        assert float(opened.read(key, torch.float16)[3, 5]) == float(torch.tensor(value).to(torch.bfloat16))
        return
    with pytest.raises(ModelError, match="above float16's 65504"):
        opened.read(key, torch.float16)
    assert torch.isfinite(opened.read(key, torch.float32)).all()
