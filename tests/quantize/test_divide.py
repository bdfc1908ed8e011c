"""Divided inputs: the numbers stay, wherever the division lands, and the negative twin shows that it did land."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tmc_export.quantize._divide import divide_inputs
from tmc_export.quantize._inputs import Product, input_scale, quantize_inputs

K, INNER = 6, 4
DIVISORS = {"a.weight": np.array([0.1, 0.5, 1, 2, 8, 30], np.float32), "b.weight": np.array([4, 0.25, 3, 0.7], np.float32)}
DIVISORS["c.weight"] = DIVISORS["a.weight"]


def stored(name: str, *shape: int, dtype: Any = np.float32) -> ir.Value:
    tensor = ir.tensor(np.random.default_rng(sum(name.encode())).standard_normal(shape).astype(dtype), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def norm(kind: str, x: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """Something that makes `[3, K]` of x."""
    gain, bias = stored("gain", K), stored("bias", K)
    if kind == "layer":
        return [ir.node("LayerNormalization", [x, gain, bias])], [gain, bias]
    if kind == "gain":
        return [ir.node("Mul", [gain, x])], [gain]
    if kind == "gain and bias":
        scaled = ir.node("Mul", [x, gain])
        return [scaled, ir.node("Add", [scaled.outputs[0], bias])], [gain, bias]
    if kind == "linear":
        weight = stored("w.weight", K, K)
        product = ir.node("MatMul", [x, weight])
        return [product, ir.node("Add", [bias, product.outputs[0]])], [weight, bias]
    return [ir.node("Tanh", [x])], []


def graph(kind: str, *, kept: bool = False, dtype: Any = np.float32) -> tuple[ir.Model, list[Product]]:
    """x → norm → two linears that are multiplied → a third, as gate, up and down of a feed-forward."""
    code = ir.DataType.FLOAT if dtype == np.float32 else ir.DataType.FLOAT16
    x = ir.Value(name="x", shape=ir.Shape((3, K)), type=ir.TensorType(code))
    nodes, held = norm(kind, x)
    top = nodes[-1].outputs[0]
    weights = [
        stored("a.weight", K, INNER, dtype=dtype),
        stored("c.weight", K, INNER, dtype=dtype),
        stored("b.weight", INNER, 5, dtype=dtype),
    ]
    up, gate = ir.node("MatMul", [top, weights[0]]), ir.node("MatMul", [top, weights[1]])
    both = ir.node("Mul", [ir.node("Sigmoid", [gate.outputs[0]]).outputs[0], up.outputs[0]])
    sigmoid = both.inputs[0].producer()
    down = ir.node("MatMul", [both.outputs[0], weights[2]])
    nodes += [up, gate, sigmoid, both, down]
    outputs = [down.outputs[0]]
    products = [Product(up, "a.weight"), Product(gate, "c.weight"), Product(down, "b.weight")]
    if kept:  # one more reader of the same input, which no scheme changes
        nodes.append(ir.node("MatMul", [top, stored("kept.weight", K, 2, dtype=dtype)]))
        held.append(nodes[-1].inputs[1])
        outputs.append(nodes[-1].outputs[0])
    for number, node in enumerate(nodes):
        out = node.outputs[0]
        width = {up: INNER, gate: INNER, sigmoid: INNER, both: INNER, down: 5}.get(node, 2 if node is nodes[-1] and kept else K)
        out.name, out.shape, out.type = f"v{number}", ir.Shape((3, width)), ir.TensorType(code)
    whole = ir.Graph([x], outputs, nodes=nodes, initializers=[*held, *weights], opset_imports={"": 21}, name="g")
    return ir.Model(whole, ir_version=10), products


def answers(model: ir.Model, dtype: Any = np.float32) -> Sequence[np.ndarray]:
    import onnxruntime as ort

    for value in model.graph.initializers.values():  # tensors that are computed at use
        value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(1).standard_normal((3, K)).astype(dtype)})


@pytest.mark.parametrize(("kind", "kept", "nodes"), [
    ("layer", False, 0), ("gain", False, 0), ("gain and bias", False, 0),
    ("linear", False, 0), ("activation", False, 1), ("layer", True, 1),
])  # fmt: skip
def test_the_products_stay_and_nothing_is_added_where_stored_numbers_can_be_divided(kind: str, kept: bool, nodes: int) -> None:
    plain, _ = graph(kind, kept=kept)
    divided, products = graph(kind, kept=kept)
    before = {name: value.const_value.numpy().copy() for name, value in divided.graph.initializers.items()}
    divide_inputs(divided, products, DIVISORS)
    assert sum(n.op_type == "Mul" for n in divided.graph) == sum(n.op_type == "Mul" for n in plain.graph) + nodes
    weight = divided.graph.initializers[products[1].node.inputs[1].name].const_value.numpy()
    np.testing.assert_allclose(weight, before["c.weight"] * DIVISORS["a.weight"][:, None], rtol=1e-6)
    up = products[0].node.inputs[1].const_value.numpy()  # its rows multiplied, its columns divided for the linear behind
    np.testing.assert_allclose(up, before["a.weight"] * DIVISORS["a.weight"][:, None] / DIVISORS["b.weight"], rtol=1e-6)
    for got, want in zip(answers(divided), answers(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_not_multiplied_is_seen() -> None:
    """The negative twin: the input divided and the weight left alone."""
    plain, _ = graph("layer")
    divided, products = graph("layer")
    weight = products[0].node.inputs[1]
    divide_inputs(divided, products, DIVISORS)
    divided.graph.register_initializer(weight)
    products[0].node.replace_input_with(1, weight)
    assert np.abs(answers(divided)[0] - answers(plain)[0]).max() > 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_inputs_are_rounded_once_for_all_that_read_them(scheme: str, dtype: Any) -> None:
    clips = {"a.weight": 2.0, "c.weight": 2.0, "b.weight": 0.5}
    signed, unsigned = (graph("activation", dtype=dtype) for _ in range(2))
    for product in (*signed[1], *unsigned[1]):
        weight = product.node.inputs[1]
        weight.const_value = ir.tensor(np.ones(weight.const_value.shape.numpy(), dtype), name=weight.name)
    quantize_inputs(*signed, clips, scheme, cpu=False)
    quantize_inputs(*unsigned, clips, scheme, cpu=True)
    kinds = [n.op_type for n in signed[0].graph]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 2
    one, two = answers(signed[0], dtype)[0], answers(unsigned[0], dtype)[0]
    np.testing.assert_allclose(one, two, rtol=1e-3 if dtype == np.float16 else 1e-6)  # the same codes
    x = np.tanh(np.random.default_rng(1).standard_normal((3, K)).astype(dtype)).astype(np.float32)
    scale = float(input_scale(2.0, 127.0, dtype))
    rounded = np.clip(np.rint(x / scale), -128, 127) * scale
    if scheme == "int8" and dtype == np.float32:
        inner = rounded.sum(1, keepdims=True) @ np.ones((1, INNER))
        both = (1 / (1 + np.exp(-inner))) * inner
        step = float(input_scale(0.5, 127.0, dtype))
        want = (np.clip(np.rint(both / step), -128, 127) * step).sum(1, keepdims=True) @ np.ones((1, 5))
        np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-5)
