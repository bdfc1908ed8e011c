"""int8, fp8, bf16 and nvfp4 in bundles: what is stored where, how large it is, and that onnxruntime computes with what is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.quantize._reading import fused, graphs, parts_of
from tmc_export.core.errors import RuntimeInputError
from tmc_export.quantize._channels import channel_scales, quantize_channels
from tmc_export.quantize.fp8 import FP8
from tmc_export.quantize.int8 import INT8
from tmc_export.quantize.nvfp4 import dequantize_nvfp4, global_scale, quantize_nvfp4
from tmc_export.runtime.session import load
from tmc_export.verify.ladder import recorded_ladder

PARTS = {
    "int8": ("encoder", "projector", "decoder", "head"),
    "fp8": ("encoder", "projector", "decoder", "head"),
    "bf16": ("encoder", "projector", "decoder", "head"),
    "nvfp4": ("encoder", "projector", "decoder"),
}
CODES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN, "nvfp4": ir.DataType.FLOAT4E2M1, "bf16": ir.DataType.BFLOAT16}
LEFT = "layers.1.mlp.down_proj"

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def bundle(build: Callable[..., Path]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(scheme: str) -> Path:
        if scheme not in made:
            parts = [f"{p}: {{weights: {scheme}{f', keep: [{LEFT}]' if p == 'decoder' else ''}}}" for p in PARTS[scheme]]
            target = "{device: rtx-5090, runtime: tensorrt-rtx}" if scheme == "nvfp4" else "{device: cpu, runtime: onnxruntime}"
            made[scheme] = build(f"all_{scheme}", ", ".join(parts), target=target)
        return made[scheme]

    return get


def widened(node: ir.Node | None) -> np.ndarray:
    """What a Cast or DequantizeLinear of stored tensors gives, by numpy."""
    assert node is not None
    if node.op_type == "Cast":
        return node.inputs[0].const_value.numpy().astype(np.float32)
    codes, scales = node.inputs
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if block:
        inner = scales.producer()
        assert inner is not None and inner.op_type == "DequantizeLinear"
        return dequantize_nvfp4(codes.const_value.numpy(), *(i.const_value.numpy() for i in inner.inputs))
    wide = codes.const_value.numpy().astype(np.float32)
    return wide * scales.const_value.numpy().reshape([-1 if i == axis else 1 for i in range(wide.ndim)])


def read(model: ir.Model) -> tuple[Weights, Weights]:
    """Name of a weight in the graph → what its reader multiplies with, for those stored as codes and for those as they were."""
    coded, plain = {}, {}
    for node in model.graph:
        place = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}.get(node.op_type)
        value = node.inputs[place] if place is not None else None
        if value is None or value.is_graph_input():
            continue
        source = value.producer()
        if value.is_initializer() and len(value.const_value.shape) > 1:
            tensor = value.const_value
            if tensor.dtype == ir.DataType.FLOAT:
                plain |= {name: tensor.numpy()[..., columns] for name, columns in parts_of(value).items()}
            else:  # a look-up of codes
                coded[(value.name or "").rsplit(".", 1)[0]] = looked_up(node)
        elif source is not None and source.op_type in ("Cast", "DequantizeLinear") and source.inputs[0].is_initializer():
            stored = source.inputs[0]
            whole = widened(source)
            coded |= {name.rsplit(".", 1)[0]: whole[..., columns] for name, columns in parts_of(stored).items()}
    return coded, plain


def looked_up(node: ir.Node) -> np.ndarray:
    """The table that a look-up of codes reads, widened."""
    codes = node.inputs[0].const_value.numpy().astype(np.float32)
    cast = next(use.node for use in node.outputs[0].uses())
    product = next(use.node for use in cast.outputs[0].uses()) if cast.outputs[0].uses() else None
    if product is None or product.op_type != "Mul":
        return codes
    factors = product.inputs[1].producer().inputs[0].producer()
    return codes * factors.inputs[0].const_value.numpy()[:, None]


def want(scheme: str, weight: np.ndarray, graph_name: str) -> np.ndarray:
    """The weight as the scheme holds it, from the plain bundle's."""
    import ml_dtypes

    if scheme == "bf16":
        return weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    code = {"int8": INT8, "fp8": FP8}[scheme]
    axis = 1 if weight.ndim == 2 and not graph_name.startswith(("head", "embed", "table")) and ".embed" not in graph_name else 0
    scales = channel_scales(weight, axis, code.top)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return quantize_channels(weight, scales, axis, code).astype(np.float32) * scales.reshape(shape)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_every_weight_is_that_of_the_plain_bundle_in_codes(scheme: str, bundle: Callable[[str], Path], plain: Path) -> None:
    ours, theirs, seen, left = graphs(bundle(scheme)), graphs(plain), 0, set()
    assert ours.keys() == theirs.keys()
    for file, graph in ours.items():
        coded, rest = read(graph)
        exact, none = read(theirs[file])[::-1]
        assert not none and coded.keys() | rest.keys() == exact.keys(), file
        if file.startswith("compress"):
            assert not coded
        for name, got in coded.items():
            assert np.array_equal(got, want(scheme, exact[name], name)), (file, name)
            assert not np.array_equal(got, exact[name])
            seen += 1
        for name, got in rest.items():
            assert np.array_equal(got, exact[name])
            left |= set() if file.startswith("compress") else {name}
    assert seen > 40 and any("down_proj" in name for name in left)
    tables = {name for name in left if "embed" in name}
    assert bool(tables) == (scheme == "fp8") or scheme == "bf16"  # fp8 rows cannot be looked up; no scheme but int8 has kernels


def test_nvfp4_shares_a_scale_where_an_input_is_shared(bundle: Callable[[str], Path], plain: Path) -> None:
    seen = 0
    for file, graph in graphs(bundle("nvfp4"), "block").items():
        coded, rest = read(graph)
        exact, _ = read(graphs(plain, file)[file])[::-1]
        for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            names = [n for n in coded if any(f".{word}." in n for word in group)]
            if not names:
                assert file.startswith("block_1") and group == ("down_proj",) and any("down_proj" in n for n in rest)
                continue
            scale = global_scale(max(float(np.abs(exact[n]).max()) for n in names), np.float32)
            for name in names:
                codes, scales = quantize_nvfp4(exact[name], scale)
                assert np.array_equal(coded[name], dequantize_nvfp4(codes, scales, scale)), (file, name)
                seen += 1
        operators = [node.op_type for node in graph.graph]
        assert operators.count("DequantizeLinear") == 2 * (5 - (file.startswith("block_1")))  # query, key and value are one
        assert graph.opset_imports[""] == 23 and graph.ir_version >= 11
    assert seen == 3 * (7 + 6)


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("fp8", 8), ("bf16", 16), ("nvfp4", 4.5)])
def test_each_weight_is_stored_once_in_its_few_bytes(scheme: str, bits: float, bundle: Callable[[str], Path], plain: Path) -> None:
    folder = bundle(scheme)
    for block in ("block_0", "block_1"):
        places, codes = set(), 0
        for phase, graph in graphs(folder, block).items():
            for value in graph.graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and tensor.location == f"{block}.data":
                    places.add((tensor.offset, tensor.length))
                    if tensor.dtype == CODES[scheme] and phase.endswith("decode"):
                        codes += tensor.nbytes
                        assert tensor.nbytes == -(-tensor.size * bits // 8) or scheme == "nvfp4"
        symbolic = ir.load(folder / "engines" / f"{block}.onnx")
        shared = {(t.offset, t.length) for v in symbolic.graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)}
        assert shared and shared <= places  # the engine builder's graph reads the same bytes
        size, before = ((b / "onnx" / f"{block}.data").stat().st_size for b in (folder, plain))
        kept = 0 if block == "block_0" else 4 * 64 * 128 + (4 * 320 * 64 if scheme == "nvfp4" else 0)  # the head is not nvfp4
        assert codes and size - kept < (bits / 32 + 0.08) * (before - kept) + 8192


@pytest.mark.parametrize("phase", ["prefill", "chunk", "decode"])
def test_onnxruntime_multiplies_int8_codes_as_they_are(phase: str, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    nodes = fused(bundle("int8") / "onnx" / f"block_0_{phase}.onnx", tmp_path / "fused.onnx", 1)
    eight = [n for n in nodes if n.op_type == "MatMulNBits"]
    assert len(eight) == 5 and {a.i for n in eight for a in n.attribute if a.name == "bits"} == {8}
    assert not any(n.op_type == "DequantizeLinear" for n in nodes)


# ------------------------------------------------------------------------------------------------------------- numbers
def replaced(file: Path, out: Path, factor: float = 1.0) -> Path:
    """Write a graph with every coded weight replaced by what numpy makes of it (the first one times `factor`), in float32."""
    model = ir.load(file)
    widening = [n for n in model.graph if n.op_type in ("DequantizeLinear", "Cast") and n.inputs[0].is_initializer()]
    inner = {n for n in widening if any(use.node in widening for use in n.outputs[0].uses())}
    for number, node in enumerate(n for n in widening if n not in inner):
        array = (widened(node) * np.float32(factor if number == 0 else 1.0)).astype(np.float32)
        value = ir.val(f"replaced.{number}", const_value=ir.tensor(array, name=f"replaced.{number}"))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
    model.graph.remove(list(inner), safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
        elif isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)
    assert not any(n.op_type == "DequantizeLinear" for n in model.graph)
    ir.save(model, out)
    return out


def answers(file: Path) -> dict[str, np.ndarray]:
    """Outputs for made-up inputs: order and flags as in a prompt, the rest random."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for each in session.get_inputs():
        shape = tuple(each.shape)
        if each.type == "tensor(int64)":
            feed[each.name] = np.broadcast_to(np.arange(shape[-1]), shape).copy() if len(shape) > 1 else np.full(shape, 3)
        else:
            feed[each.name] = np.ones(shape, np.bool_) if each.type == "tensor(bool)" else draw.standard_normal(shape).astype(np.float32)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def worst(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    assert got.keys() == expected.keys() and got
    return max(float(np.abs(got[n] - expected[n]).max() / max(1.0, np.abs(expected[n]).max())) for n in got if got[n].dtype == np.float32)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
@pytest.mark.parametrize("graph", ["vision_0", "embed_prefill", "block_0_prefill", "block_1_prefill"])
def test_onnxruntime_computes_with_the_stored_codes(graph: str, scheme: str, bundle: Callable[[str], Path], tmp_path: Path) -> None:
    file = bundle(scheme) / "onnx" / f"{graph}.onnx"
    got = answers(file)
    if graph.startswith("embed"):  # a look-up has no node to replace: its table was compared above
        assert all(np.isfinite(a).all() for a in got.values())
        return
    assert worst(got, answers(replaced(file, tmp_path / "replaced.onnx"))) <= 2e-5  # float32 sums in another order
    assert worst(got, answers(replaced(file, tmp_path / "wrong.onnx", factor=1.02))) > 1e-4


@pytest.mark.parametrize("graph", ["vision_0", "block_0_prefill", "block_1_prefill"])
def test_nvfp4_widened_by_numpy_is_within_its_noise(graph: str, bundle: Callable[[str], Path], plain: Path, tmp_path: Path) -> None:
    """onnxruntime cannot execute it: what the codes stand for is run instead, beside the float32 graph."""
    with pytest.raises(Exception, match="DequantizeLinear"):
        answers(bundle("nvfp4") / "onnx" / f"{graph}.onnx")
    got = answers(replaced(bundle("nvfp4") / "onnx" / f"{graph}.onnx", tmp_path / "replaced.onnx"))
    exact = answers(plain / "onnx" / f"{graph}.onnx")
    for name, value in exact.items():
        if value.dtype == np.float32:
            noise = np.square(got[name] - value, dtype=np.float64).sum()
            assert noise == 0 or 10 * np.log10(np.square(value, dtype=np.float64).sum() / noise) > 10, name


@pytest.mark.parametrize("scheme", ["int8", "fp8", "bf16"])
def test_the_bundle_answers(scheme: str, bundle: Callable[[str], Path]) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (42, 42, 3), np.uint8)
    answer = load(bundle(scheme), threads=1).generate([picture], "what is it", max_new_tokens=4)
    assert len(answer.tokens) == 4 or answer.finish == "eos"


def test_an_nvfp4_bundle_says_that_onnxruntime_does_not_execute_it(bundle: Callable[[str], Path]) -> None:
    ladder = recorded_ladder(bundle("nvfp4"))
    told = {rung.name: (rung.status, rung.note) for rung in ladder.rungs}
    assert told["files"][0] == "passed"
    for name in ("onnxruntime end to end", "quantized"):
        assert told[name] == ("not run", "onnxruntime's CPU path does not execute nvfp4; only the device does")
    other = {rung.name: rung.note for rung in recorded_ladder(bundle("int8")).rungs}
    assert "does not execute" not in other["quantized"]
    with pytest.raises(RuntimeInputError, match="nvfp4 weights, which onnxruntime's CPU path does not execute"):
        load(bundle("nvfp4"))
