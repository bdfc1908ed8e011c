"""int4 in a bundle: what is stored, what is left alone, what onnxruntime and TensorRT-RTX make of it, and that it computes right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.quantize._reading import checkpoint, fused, graphs, int4_weights
from tmc_export.core.errors import RuntimeInputError
from tmc_export.quantize.int4 import dequantize_blocks, quantize_blocks
from tmc_export.runtime._backend import BackendOptions, open_backend
from tmc_export.runtime.session import load

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
KEPT = "layers.1.mlp.down_proj"
LAYER = {"block_0": 0, "block_1": 1}


def name_in_checkpoint(weights: dict[str, np.ndarray], block: str, linear: str) -> str:
    """`layers.0.mlp.up_proj` of block_1 → the checkpoint's name, whose layers are counted over the whole decoder."""
    tail = linear.replace("layers.0.", f"layers.{LAYER[block]}.", 1) + ".weight"
    (name,) = (n for n in weights if n.endswith(tail) and "vision" not in n)
    return name


def test_stored_codes_and_scales_are_those_of_the_checkpoint(int4: Path, model: Path) -> None:
    weights, seen = checkpoint(model), set()
    for file, graph in graphs(int4, "block").items():
        block = file[:7]
        for linear, (codes, scales) in int4_weights(graph).items():
            name = name_in_checkpoint(weights, block, linear)
            want = quantize_blocks(np.ascontiguousarray(weights[name].T), 32)
            assert np.array_equal(codes, want[0]) and np.array_equal(scales, want[1]), (file, linear)
            error = dequantize_blocks(codes, scales) - weights[name].T
            assert 10 * np.log10((weights[name] ** 2).sum() / (error**2).sum()) > 19.5, name
            seen.add((file, name))
    assert len(seen) == 3 * (7 + 6)  # three phases, two layers of seven linears, one kept


def test_a_kept_linear_stays_as_it_is(int4: Path, model: Path) -> None:
    weights = checkpoint(model)
    (name,) = (n for n in weights if n.endswith(f"{KEPT}.weight"))
    for graph in graphs(int4, "block_1").values():
        (kept,) = (v.const_value for n, v in graph.graph.initializers.items() if "down_proj" in n)
        assert kept.dtype == ir.DataType.FLOAT and np.array_equal(kept.numpy(), weights[name].T)


def test_only_the_decoders_linears_are_quantized(int4: Path) -> None:
    for file, graph in graphs(int4).items():
        names = int4_weights(graph)
        assert not names or file.startswith("block"), file
        assert {n.split(".")[-1] for n in names} <= LINEARS
        reads = {i.name for node in graph.graph if node.op_type == "Gemm" for i in node.inputs if i is not None and i.is_initializer()}
        assert not any("int4" in n for n in reads)


def test_score_top_k_and_gather_are_never_quantized(int4: Path, plain: Path) -> None:
    (ours,), (theirs,) = graphs(int4, "compress").values(), graphs(plain, "compress").values()
    operators = [node.op_type for node in ours.graph]
    assert "DequantizeLinear" not in operators and operators == [node.op_type for node in theirs.graph]
    weights = {n: v.const_value for n, v in ours.graph.initializers.items() if "q_proj" in n or "k_proj" in n}
    assert len(weights) >= 2, "this compress graph must read weights, or the test shows nothing"
    for name, tensor in weights.items():
        assert tensor.dtype == ir.DataType.FLOAT
        assert np.array_equal(tensor.numpy(), theirs.graph.initializers[name].const_value.numpy())


def stored(graph: ir.Model) -> dict[str, ir.ExternalTensor]:
    """Name → tensor, of what a graph reads from weight files."""
    return {n: t for n, v in graph.graph.initializers.items() if isinstance(t := v.const_value, ir.ExternalTensor)}


@pytest.mark.parametrize("block", ["block_0", "block_1"])
def test_each_weight_is_stored_once_in_its_few_bytes(int4: Path, plain: Path, block: str) -> None:
    files = graphs(int4, block)
    before, after = stored(graphs(plain, block)[f"{block}_decode"]), stored(files[f"{block}_decode"])
    seen = 0
    for name, tensor in before.items():
        codes, scales = ("+".join(f"{part}.{word}" for part in name.split("+")) for word in ("int4", "scale"))
        if codes in after:  # 4 bits and a float32 scale per 32 weights are 0.15625 of 32 bits
            scale = files[f"{block}_decode"].graph.initializers[scales].const_value  # a small one lies in the graph itself
            assert after[codes].nbytes + scale.nbytes <= 0.16 * tensor.nbytes
            assert name not in after
            seen += 1
    assert seen == (5 if block == "block_0" else 4)  # query, key and value are one; block_1 keeps one
    places = {(t.location, t.offset, t.length) for graph in files.values() for t in stored(graph).values()}
    assert places == {(t.location, t.offset, t.length) for t in after.values()}  # every phase reads the same bytes
    used = sum(length for location, _, length in places if location == f"{block}.data")
    padding = 4096 * sum(length >= 1 << 16 for _, _, length in places)
    assert used <= (int4 / "onnx" / f"{block}.data").stat().st_size <= used + padding


@pytest.mark.parametrize("accuracy", [1, 4])
@pytest.mark.parametrize("phase", ["prefill", "chunk", "decode"])
def test_onnxruntime_fuses_every_pair(int4: Path, tmp_path: Path, phase: str, accuracy: int) -> None:
    for block, count in (("block_0", 5), ("block_1", 4)):  # query, key and value are one
        nodes = fused(int4 / "onnx" / f"{block}_{phase}.onnx", tmp_path / "fused.onnx", accuracy)
        four_bit = [n for n in nodes if n.op_type == "MatMulNBits"]
        assert len(four_bit) == count and not any(n.op_type == "DequantizeLinear" for n in nodes)
        for node in four_bit:
            fields = {a.name: a.i for a in node.attribute}
            assert (fields["bits"], fields["block_size"], fields["accuracy_level"]) == (4, 32, accuracy)


# ------------------------------------------------------------------------------------------------------------- numbers
def block_of(model: Path, bundle: Path, index: int, factor: float = 1.0) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A block in float32 torch, its linears set to `scale · code` (one scale times `factor`), and inputs for its prefill graph."""
    from transformers import AutoModelForImageTextToText

    from tmc_export.families import FAMILIES
    from tmc_export.plan.resolve import resolve
    from tmc_export.plan.source import read_model_files
    from tmc_export.recipe import load_recipe
    from tmc_export.surgery.attention import register_attention
    from tmc_export.surgery.block import DecoderBlock

    plan = resolve(load_recipe(model.parent / f"{bundle.name}.yaml"), read_model_files(model))
    whole = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    whole.config.text_config._attn_implementation = register_attention()
    block = plan.blocks[index]
    module = DecoderBlock(FAMILIES.get("llava").decoder(whole), block, plan.windows)
    state = dict(module.named_parameters())
    changed = int4_weights(graphs(bundle, f"block_{index}_prefill")[f"block_{index}_prefill"])
    assert changed
    for n, (linear, (codes, scales)) in enumerate(sorted(changed.items())):
        scales = scales * np.float32(factor if n == 0 else 1.0)
        state[f"{linear}.weight"].data = torch.from_numpy(np.ascontiguousarray(dequantize_blocks(codes, scales).T))
    t, d = block.tokens, plan.facts.decoder
    order = torch.arange(t)[None]
    inputs = [
        torch.randn(1, t, d.width, generator=torch.Generator().manual_seed(0)),
        order[None],
        order,
        torch.ones(1, t, dtype=torch.bool),
    ]
    inputs += [torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.bool)]
    inputs += [torch.tensor([t - 1])] if module.needs_last else []
    inputs += [torch.zeros(1, d.kv_heads, 0, d.head_dim) for _ in range(2 * (block.last - block.first))]
    return module, tuple(inputs)


def worst_error(model: Path, bundle: Path, index: int, *, accuracy: int = 1, factor: float = 1.0) -> float:
    """Largest difference between the graph and torch, relative to the largest value of its tensor where that is above 1."""
    module, inputs = block_of(model, bundle, index, factor)
    with torch.no_grad():
        want = module(*inputs)
    graph = open_backend("onnxruntime", bundle, BackendOptions(int4_accuracy=accuracy)).graph(f"onnx/block_{index}_prefill.onnx")
    got = graph.run({n: x.numpy() for n, x in zip(module.input_names(), inputs, strict=True) if x.numel()})
    errors = []
    for name, tensor in zip(module.output_names(), want, strict=True):
        assert got[name].shape == tuple(tensor.shape), name
        errors.append(np.abs(got[name] - tensor.numpy()).max() / max(1.0, float(tensor.abs().max())))
    return float(max(errors))


@pytest.mark.parametrize("index", [0, 1])
def test_a_block_computes_what_torch_does_with_the_stored_weights(int4: Path, model: Path, index: int) -> None:
    assert worst_error(model, int4, index) <= 1e-5  # float32 sums of up to 128 terms, in another order


def test_a_scale_one_percent_off_is_seen(int4: Path, model: Path) -> None:
    assert worst_error(model, int4, 0, factor=1.01) > 1e-4


def test_accuracy_level_4_is_another_arithmetic(int4: Path, model: Path) -> None:
    error = worst_error(model, int4, 0, accuracy=4)
    assert 1e-4 < error < 0.1  # activations rounded to 8 bits


# ------------------------------------------------------------------------------------------------------------- the rest
def test_the_default_is_the_fast_level_and_others_are_refused(int4: Path) -> None:
    assert BackendOptions().int4_accuracy == 4
    with pytest.raises(RuntimeInputError, match="int4_accuracy is 2; use 4"):
        load(int4, int4_accuracy=2)


@pytest.mark.parametrize("accuracy", [1, 4])
def test_the_bundle_answers(int4: Path, accuracy: int) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (42, 42, 3), np.uint8)
    answer = load(int4, threads=1, int4_accuracy=accuracy).generate([picture], "what is it", max_new_tokens=4)
    assert len(answer.tokens) == 4 or answer.finish == "eos"


def test_a_float16_bundle_with_int4_answers(build, tmp_path: Path) -> None:
    quantize = "encoder: {weights: fp16}, head: {weights: fp16}, kv: {weights: fp16}, decoder: {weights: int4, block: 64}"
    bundle = build("int4half", quantize, dtype="float16")
    for graph in graphs(bundle, "block").values():
        assert all(scales.dtype == np.float16 for _, scales in int4_weights(graph).values())
        assert not any(t.dtype == ir.DataType.FLOAT for t in stored(graph).values())
    nodes = fused(bundle / "onnx" / "block_0_decode.onnx", tmp_path / "fused.onnx", 4)
    assert sum(n.op_type == "MatMulNBits" for n in nodes) == 5
    picture = np.random.default_rng(0).integers(0, 255, (42, 42, 3), np.uint8)
    assert load(bundle, threads=1).generate([picture], "what is it", max_new_tokens=3).tokens


def test_tensorrt_rtx_builds_the_blocks(int4: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    from tmc_export.engine import EngineOptions, build_engine
    from tmc_export.engine._wire import profiles_from

    listed = json.loads((int4 / "engines" / "profiles.json").read_text())["subgraphs"]
    (block,) = (s for s in listed if s["name"] == "block_0")
    assert block["precision"] == "int4"
    report = build_engine(
        int4 / block["onnx"], profiles_from(block["profiles"]), tmp_path / "block_0.engine", EngineOptions(), precision="int4"
    )
    assert report.size > 0 and len(report.profiles) == len(block["profiles"])
