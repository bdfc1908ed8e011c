"""A weight rounded for a measurement is the one that a graph multiplies with: graph by graph, scheme by scheme."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tmc_export.core.errors import LegalityError, ModelError
from tmc_export.export.lazy_tensors import KeyedTensor
from tmc_export.plan.types import QuantizePlan
from tmc_export.quantize import SCHEMES
from tmc_export.quantize._divide import divide_inputs
from tmc_export.quantize._inputs import Product
from tmc_export.quantize.nvfp4 import dequantize_nvfp4
from tmc_export.quantize.rounded import rounded_weight, shared_scale

WEIGHTS = {
    name: np.random.default_rng(n).normal(size=(24, 64)).astype(np.float32) * (n + 1) for n, name in enumerate(("a.weight", "b.weight"))
}
PLANS = [
    QuantizePlan("int8"),
    QuantizePlan("fp8"),
    QuantizePlan("int4", 32),
    QuantizePlan("nvfp4", 16),
    QuantizePlan("bf16"),
    QuantizePlan("fp16"),
]


def graph(dtype: Any = np.float32) -> ir.Model:
    """Two products of one input, as traced."""
    kind = ir.DataType.FLOAT16 if dtype == np.float16 else ir.DataType.FLOAT
    x = ir.Value(name="x", shape=ir.Shape([1, 64]), type=ir.TensorType(kind))
    stored, nodes = [], []
    for name, weight in WEIGHTS.items():
        tensor = KeyedTensor(
            f"{name}|transpose(1, 0)", lambda w=weight: ir.tensor(np.ascontiguousarray(w.T.astype(dtype))), kind, (64, 24), name
        )
        stored.append(ir.Value(name=name, shape=ir.Shape((64, 24)), type=ir.TensorType(kind), const_value=tensor))
        nodes.append(ir.node("MatMul", [x, stored[-1]], name=f"{name}.product"))
        nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = ir.Shape((1, 24)), ir.TensorType(kind)
        nodes[-1].outputs[0].name = f"{name}.out"
    made = ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, initializers=stored, opset_imports={"": 21}, name="two")
    return ir.Model(made, ir_version=10)


def widened(value: ir.Value) -> np.ndarray:
    """What a graph multiplies with, by numpy, `[K, N]`."""
    node = value.producer()
    if node is None:
        return np.asarray(value.const_value.numpy())
    if node.op_type == "Cast":
        return node.inputs[0].const_value.numpy().astype(np.float32)
    codes, scales = node.inputs
    if (inner := scales.producer()) is not None:
        return dequantize_nvfp4(codes.const_value.numpy(), *(i.const_value.numpy() for i in inner.inputs))
    wide, each = codes.const_value.numpy().astype(np.float32), scales.const_value.numpy()
    block = node.attributes.get_int("block_size", 0)
    return wide * (np.repeat(each, block, axis=0) if block else each)


@pytest.mark.parametrize("divided", [False, True], ids=["", "divided"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.weights)
def test_it_is_what_the_graph_multiplies_with(plan: QuantizePlan, divided: bool) -> None:
    model = graph()
    products = [Product(node, f"{'ab'[n]}.weight") for n, node in enumerate(model.graph)]
    divisor = np.linspace(0.5, 2, 64).astype(np.float32) if divided else None
    if divisor is not None:
        divide_inputs(model, products, dict.fromkeys(WEIGHTS, divisor))
    SCHEMES.get(plan.weights)(model, plan, lambda _: True)
    scaled = [w * (1 if divisor is None else divisor) for w in WEIGHTS.values()]
    shared = shared_scale(list(WEIGHTS), scaled) if plan.weights == "nvfp4" else None
    for product, weight in zip(products, WEIGHTS.values(), strict=True):
        got = rounded_weight(product.name, weight, plan, divisor=divisor, shared=shared)
        want = widened(product.node.inputs[1]).astype(np.float32)
        np.testing.assert_array_equal(got, want.T)
        assert got.dtype == np.float32 and np.abs(got - weight).max() > 0


def test_another_block_or_scale_is_another_weight() -> None:
    weight = WEIGHTS["a.weight"]
    assert (rounded_weight("a", weight, QuantizePlan("int4", 32)) != rounded_weight("a", weight, QuantizePlan("int4", 64))).any()
    alone, together = (shared_scale(list(WEIGHTS)[:n], list(WEIGHTS.values())[:n]) for n in (1, 2))
    pair = [rounded_weight("a", weight, QuantizePlan("nvfp4", 16), shared=s) for s in (alone, together)]
    assert (pair[0] != pair[1]).any() and (pair[0] == rounded_weight("a", weight, QuantizePlan("nvfp4", 16))).all()


def test_codes_that_were_chosen_are_taken() -> None:
    codes, scales = np.full((64, 24), 3, np.int8), np.full((2, 24), 0.5, np.float32)
    assert (rounded_weight("a", WEIGHTS["a.weight"], QuantizePlan("int4", 32), chosen=(codes, scales)) == 1.5).all()


def test_a_kernel_keeps_its_shape() -> None:
    kernel = np.random.default_rng(1).normal(size=(4, 3, 2, 2)).astype(np.float32)
    got = rounded_weight("k", kernel, QuantizePlan("int8"))
    assert got.shape == kernel.shape and 0 < np.abs(got - kernel).max() <= np.abs(kernel).max() / 127


def test_what_a_scheme_cannot_hold_is_refused() -> None:
    with pytest.raises(LegalityError, match="block: 128 does not divide the 64 input channels of 'a'"):
        rounded_weight("a", WEIGHTS["a.weight"], QuantizePlan("int4", 128))
    broken = WEIGHTS["a.weight"].copy()
    broken[0, 0] = np.inf
    for plan in PLANS:
        if plan.weights != "int4":
            with pytest.raises(ModelError, match="not finite|cannot|65504"):
                rounded_weight("a.weight", broken, plan)
