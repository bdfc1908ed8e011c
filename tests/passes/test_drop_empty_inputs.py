from __future__ import annotations

import numpy as np
import onnx_ir.passes.common as common

from tests.passes._models import graph, operators, run
from tmc_export.passes.drop_empty_inputs import DropEmptyInputsPass

X, Z = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 3), np.float32)


def test_an_empty_past_goes() -> None:
    text = "(float[0, 3] past, float[2, 3] x) => (float[2, 3] y) { c = Concat<axis = 0>(past, x)  y = Neg(c) }"
    model = graph(text)
    assert DropEmptyInputsPass()(model).modified
    assert operators(model) == ["Neg"] and [i.name for i in model.graph.inputs] == ["x"]
    np.testing.assert_array_equal(run(model, {"x": X})[0], -X)


def test_an_empty_past_of_codes_goes_with_what_widens_it() -> None:
    text = """(int8[0, 3] past, float[2, 3] x, float s) => (float[2, 3] y) {
      w = DequantizeLinear(past, s)  c = Concat<axis = 0>(w, x)  y = Neg(c)
    }"""
    model = common.ShapeInferencePass()(graph(text)).model
    assert DropEmptyInputsPass()(model).modified
    assert operators(model) == ["Neg"] and [i.name for i in model.graph.inputs] == ["x"]
    np.testing.assert_array_equal(run(model, {"x": X})[0], -X)


def test_codes_that_are_there_are_widened() -> None:
    text = "(int8[1, 3] past, float[2, 3] x, float s) => (float[3, 3] y) { w = DequantizeLinear(past, s)  y = Concat<axis = 0>(w, x) }"
    model = common.ShapeInferencePass()(graph(text)).model
    assert not DropEmptyInputsPass()(model).modified and operators(model) == ["DequantizeLinear", "Concat"]


def test_the_others_are_still_joined() -> None:
    text = "(float[0, 3] past, float[2, 3] x, float[1, 3] z) => (float[3, 3] y) { y = Concat<axis = 0>(x, past, z) }"
    model = graph(text)
    DropEmptyInputsPass()(model)
    assert operators(model) == ["Concat"] and model.graph.outputs[0].name == "y"
    np.testing.assert_array_equal(run(model, {"x": X, "z": Z})[0], np.concatenate([X, Z]))


def test_an_output_that_is_the_join_keeps_its_name() -> None:
    model = graph("(float[0, 3] past, float[2, 3] x) => (float[2, 3] y) { y = Concat<axis = 0>(past, x) }")
    DropEmptyInputsPass()(model)
    assert model.graph.outputs[0].name == "y"
    np.testing.assert_array_equal(run(model, {"x": X})[0], X)


def test_an_input_that_nobody_reads_goes() -> None:
    model = graph("(float[2, 3] x, int64[1] positions) => (float[2, 3] y) { y = Neg(x) }")
    assert DropEmptyInputsPass()(model).modified and [i.name for i in model.graph.inputs] == ["x"]


def test_a_past_that_holds_something_stays() -> None:
    model = graph("(float[1, 3] past, float[2, 3] x) => (float[3, 3] y) { y = Concat<axis = 0>(past, x) }")
    assert not DropEmptyInputsPass()(model).modified
    assert [i.name for i in model.graph.inputs] == ["past", "x"]


def test_an_empty_input_that_something_else_reads_stays() -> None:
    model = graph("(float[0, 3] past) => (float[0, 3] y) { y = Neg(past) }")
    assert not DropEmptyInputsPass()(model).modified and len(model.graph.inputs) == 1
