from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from numpy.typing import NDArray

from tests.passes._models import graph, operators, run
from tmc_export.passes.join_projections import JoinProjectionsPass
from tmc_export.plan.types import QuantizePlan
from tmc_export.quantize import SCHEMES

HEAD = "(float[1, 3, 64] x) => (float[1, 3, 8] q, float[1, 3, 4] k, float[1, 3, 6] v)"
PLAIN = HEAD + " { a = MatMul(x, wq)  b = MatMul(x, wk)  c = MatMul(x, wv)  q = Neg(a)  k = Neg(b)  v = Neg(c) }"
BIASED = HEAD + (
    " { d = MatMul(x, wq)  a = Add(d, bq)  e = MatMul(x, wk)  b = Add(bk, e)  f = MatMul(x, wv)  c = Add(f, bv)"
    " q = Neg(a)  k = Neg(b)  v = Neg(c) }"
)
WIDTHS = {"q": 8, "k": 4, "v": 6}


def weights(bias: bool = False) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    found = {f"w{n}": rng.standard_normal((64, w)).astype(np.float32) for n, w in WIDTHS.items()}
    return found | ({f"b{n}": rng.standard_normal(w).astype(np.float32) for n, w in WIDTHS.items()} if bias else {})


def model(text: str, scheme: str | None = None, bias: bool = False) -> ir.Model:
    made = common.ShapeInferencePass()(graph(text, **weights(bias))).model
    if scheme is not None:
        SCHEMES.get(scheme)(made, QuantizePlan(scheme, block=32), lambda name: name.startswith("w"))
    return made


def x() -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(1).standard_normal((1, 3, 64)).astype(np.float32)}


@pytest.mark.parametrize("scheme", [None, "fp16", "bf16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("bias", [False, True])
def test_three_products_become_one(scheme: str | None, bias: bool) -> None:
    text = BIASED if bias else PLAIN
    before, after = model(text, scheme, bias), model(text, scheme, bias)
    assert JoinProjectionsPass()(after).modified
    assert operators(after).count("MatMul") == 1 and operators(after).count("Add") == int(bias)
    assert {tuple(i.shape.numpy()) for i in after.graph.initializers.values() if i.shape is not None} >= {(3,), (64, 18)}
    for got, want in zip(run(after, x()), run(before, x()), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    wrong = {"x": x()["x"][:, ::-1].copy()}
    assert np.abs(run(after, wrong)[1] - run(before, x())[1]).max() > 0.1


def test_the_bytes_are_named_by_all_that_they_hold() -> None:
    one, two = model(PLAIN), model(PLAIN)
    two.graph.initializers["wv"].const_value = ir.tensor(np.ones((64, 6), np.float32), name="wv")
    keys = []
    for each in (one, two):
        JoinProjectionsPass()(each)
        keys.append(next(getattr(v.const_value, "key", "") for n, v in each.graph.initializers.items() if n.startswith("wq")))
    assert keys[0] != keys[1] and all(key.startswith("join(") for key in keys)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + " { a = MatMul(x, wq)  b = MatMul(x, wk)  q = Neg(a)  k = Neg(b)  y = Neg(x)  c = MatMul(y, wv)  v = Neg(c) }",
        PLAIN.replace("MatMul(x, wk)", "MatMul(x, wk16)").replace("{", "{ wk16 = Identity(wk) ", 1),
    ],
    ids=["another input", "a weight that is computed"],
)
def test_two_of_a_kind_are_left_alone(text: str) -> None:
    assert not JoinProjectionsPass()(model(text)).modified


def test_weights_stored_differently_are_not_joined() -> None:
    mixed = common.ShapeInferencePass()(graph(PLAIN, **weights())).model
    SCHEMES.get("fp16")(mixed, QuantizePlan("fp16"), lambda name: name == "wk")
    assert not JoinProjectionsPass()(mixed).modified


def test_codes_with_two_scales_are_joined_where_one_is_shared() -> None:
    after = model(PLAIN, "nvfp4")
    assert JoinProjectionsPass()(after).modified
    assert operators(after).count("MatMul") == 1 and operators(after).count("DequantizeLinear") == 2
    shapes = sorted(tuple(v.const_value.shape.numpy()) for v in after.graph.initializers.values())
    assert shapes == [(), (3,), (4, 18), (64, 18)]
    apart = model(PLAIN, "nvfp4")
    inner = [n for n in apart.graph if n.op_type == "DequantizeLinear" and n.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN]
    own = ir.val("own", const_value=ir.tensor(np.float32(0.5), name="own"))
    apart.graph.register_initializer(own)
    inner[0].replace_input_with(1, own)  # another scale: these codes stand for other numbers
    assert not JoinProjectionsPass()(apart).modified
