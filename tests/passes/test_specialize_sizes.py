from __future__ import annotations

import numpy as np
import pytest

from tests.passes._models import graph, run
from tmc_export.core.errors import ExportError
from tmc_export.passes.pipeline import specialize
from tmc_export.passes.specialize_sizes import SpecializeSizesPass

TEXT = "(float[T, 4] x, float[P, 4] past) => (float[N, 4] y) { y = Concat<axis = 0>(past, x) }"


def test_symbols_become_numbers() -> None:
    model = graph(TEXT)
    assert SpecializeSizesPass({"T": 5, "P": 2, "N": 7})(model).modified
    assert [tuple(v.shape or ()) for v in [*model.graph.inputs, *model.graph.outputs]] == [(5, 4), (2, 4), (7, 4)]
    assert not SpecializeSizesPass({"T": 6})(model).modified


def test_a_symbol_without_a_number_stays() -> None:
    model = graph(TEXT)
    SpecializeSizesPass({"T": 5})(model)
    assert [str(v.shape) for v in model.graph.inputs] == ["[5,4]", "[P,4]"]


def test_inferred_shapes_that_mention_symbols_are_forgotten() -> None:
    model = graph("(float[T, 4] x) => (float[T, 4] y) <float[S, 4] a> { a = Neg(x)  y = Neg(a) }")
    inner = model.graph[0].outputs[0]
    assert inner.shape is not None
    SpecializeSizesPass({"T": 5})(model)
    assert inner.shape is None


def test_specialize_leaves_the_symbolic_graph_as_it_is() -> None:
    """Sizes computed in the graph become constants; two sizes come out of one symbolic graph."""
    text = "(float[T, 4] x, float[P, 4] past) => (float[N, 4] y) { c = Concat<axis = 0>(past, x)  s = Shape(c)  y = Expand(w, s) }"
    symbolic = graph(text, w=np.ones((1, 4), np.float32))
    for sizes in ({"T": 5, "P": 2}, {"T": 1, "P": 3}):
        static = specialize(symbolic, sizes, "test")
        total = sizes["T"] + sizes["P"]
        assert tuple(static.graph.outputs[0].shape or ()) == (total, 4)
        assert all(v.shape is not None and v.shape.is_static() for node in static.graph for v in node.outputs)
        feed = {"x": np.zeros((sizes["T"], 4), np.float32), "past": np.zeros((sizes["P"], 4), np.float32)}
        assert run(static, feed)[0].shape == (total, 4)
    assert str(symbolic.graph.inputs[0].shape) == "[T,4]"


def test_a_size_that_stays_open_is_refused() -> None:
    with pytest.raises(ExportError, match=r"test: .*every shape must be static"):
        specialize(graph(TEXT), {"T": 5}, "test")
