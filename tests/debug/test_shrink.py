"""Shrinking finds one node, or the few that fail together, wherever they are; what does not fail is left whole."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("polygraphy")

from tests.debug._graphs import BRANCHES, branches, graph, operators  # noqa: E402
from tmc_export.debug.graph import cut_out  # noqa: E402
from tmc_export.debug.shrink import shrink  # noqa: E402


def has(*wanted: str) -> Any:
    return lambda model: set(wanted) <= set(operators(model))


@pytest.mark.parametrize("operator", [node[0] for node in BRANCHES])
def test_every_node_is_found_alone(operator: str) -> None:
    assert operators(shrink(branches(), has(operator))) == [operator]


@pytest.mark.parametrize(("first", "second"), [("Exp", "Mul"), ("Mul", "Sigmoid"), ("Sigmoid", "Add"), ("Sqrt", "Exp")])
def test_two_nodes_that_fail_together(first: str, second: str) -> None:
    assert operators(shrink(branches(), has(first, second))) == [first, second]


def test_nodes_of_two_branches_keep_what_lies_between_them() -> None:
    assert operators(shrink(branches(), has("Tanh", "Sigmoid"))) == ["Tanh", "Mul", "Sigmoid"]


def test_a_model_that_does_not_fail_stays_whole() -> None:
    tried: list[int] = []
    model = branches()

    def never(part: Any) -> bool:
        tried.append(len(part.graph.node))
        return False

    assert shrink(model, never) is model and tried


def test_one_in_a_long_chain_takes_few_tries() -> None:
    chain = graph([("Erf" if i == 137 else "Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(200)], ["t0"], ["t200"])
    tries = 0

    def fails(part: Any) -> bool:
        nonlocal tries
        tries += 1
        return "Erf" in operators(part)

    assert operators(shrink(chain, fails)) == ["Erf"] and tries < 40


# --------------------------------------------------------------------------------------------------------------- cutting out
def test_what_is_cut_out_reads_what_it_needs() -> None:
    part = cut_out(branches(), ["e"], ["c"])
    assert operators(part) == ["Mul"] and [i.name for i in part.graph.input] == ["c"] and [w.name for w in part.graph.initializer] == ["w"]
    assert operators(cut_out(branches(), ["g"], ["e"])) == ["Neg", "Tanh", "Sigmoid", "Add"]
    assert operators(cut_out(branches(), ["e"], ["e"])) == ["Abs", "Sqrt", "Exp", "Mul"], "an output is computed, never an input"


def test_an_input_without_a_type_is_computed() -> None:
    model = branches()
    del model.graph.value_info[:]
    assert operators(cut_out(model, ["e"], ["c"])) == ["Abs", "Sqrt", "Exp", "Mul"]


def test_outer_values_of_a_subgraph_are_kept() -> None:
    from onnx import TensorProto, helper

    inner = helper.make_graph([helper.make_node("Add", ["b", "w"], ["r"])], "i", [], [helper.make_tensor_value_info("r", 1, [4])])
    model = branches()
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["flag"], ["z"], name="if", then_branch=inner, else_branch=inner))
    part = cut_out(model, ["z"])
    assert operators(part) == ["Abs", "Sqrt", "If"] and [w.name for w in part.graph.initializer] == ["w"]
    assert {i.name for i in part.graph.input} == {"x", "flag"}


def test_operators_of_another_domain_pass_through() -> None:
    model = graph([("Neg", ["x"], ["a"]), ("com.microsoft::Gelu", ["a"], ["b"]), ("Abs", ["b"], ["y"])], ["x"], ["y"])
    part = cut_out(model, ["b"], ["a"])
    assert part.graph.node[0].domain == "com.microsoft" and {o.domain for o in part.opset_import} == {"", "com.microsoft"}
