"""Outputs that a pass made equal keep their own names."""

from __future__ import annotations

import onnx_ir as ir

from tmc_export.passes.keep_outputs import KeepOutputsPass, output_names


def _twice() -> ir.Model:
    """Two outputs that are one value, named as the second one."""
    x = ir.val("x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Neg", [x])
    node.outputs[0].name = "kv.1"
    return ir.Model(ir.Graph([x], [node.outputs[0], node.outputs[0]], nodes=[node], opset_imports={"": 21}), ir_version=10)


def test_a_shared_value_gets_a_copy() -> None:
    model = _twice()
    result = KeepOutputsPass(["kv.0", "kv.1"])(model)
    assert result.modified and output_names(model) == ["kv.0", "kv.1"]
    assert [n.op_type for n in model.graph] == ["Neg", "Identity"]


def test_an_input_that_is_an_output_gets_a_copy() -> None:
    x = ir.val("x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    model = ir.Model(ir.Graph([x], [x], nodes=[], opset_imports={"": 21}), ir_version=10)
    KeepOutputsPass(["y"])(model)
    assert output_names(model) == ["y"] and model.graph.inputs[0].name == "x"


def test_distinct_outputs_stay_as_they_are() -> None:
    x = ir.val("x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Neg", [x])
    node.outputs[0].name = "y"
    model = ir.Model(ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 21}), ir_version=10)
    assert not KeepOutputsPass(["y"])(model).modified


def test_a_value_inside_that_has_an_outputs_name_gives_it_up() -> None:
    """Two outputs return one value while another value, which the graph still reads, has the second one's name."""
    x = ir.val("x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    inside = ir.node("Neg", [x])
    inside.outputs[0].name = "kv.1"
    last = ir.node("Abs", [inside.outputs[0]])
    last.outputs[0].name = "kv.0"
    model = ir.Model(ir.Graph([x], [last.outputs[0]] * 2, nodes=[inside, last], opset_imports={"": 21}), ir_version=10)
    KeepOutputsPass(["kv.0", "kv.1"])(model)
    names = [out.name for node in model.graph for out in node.outputs]
    assert output_names(model) == ["kv.0", "kv.1"] and len(set(names)) == len(names) == 3
    assert [n.op_type for n in model.graph] == ["Neg", "Abs", "Identity"]
