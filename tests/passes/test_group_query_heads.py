from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from numpy.typing import NDArray

from tests.passes._models import graph, operators, run
from tmc_export.passes.group_query_heads import GroupQueryHeadsPass

SCORES = """(float[B, 6, T, 4] q, float[B, 2, 16, 4] k, float[B, 2, 16, 4] v) => (float[B, 6, T, 4] y) {
  k5 = Unsqueeze(k, two)  ke = Expand(k5, wide)  kh = Reshape(ke, flat)  kt = Transpose<perm = [0, 1, 3, 2]>(kh)
  v5 = Unsqueeze(v, two)  ve = Expand(v5, wide)  vh = Reshape(ve, flat)
  s = MatMul(q, kt)  w = Softmax<axis = -1>(s)  z = MatMul(w, vh)  y = Identity(z)
}"""


def attention(batch: int, queries: int, groups: int = 2) -> ir.Model:
    text = SCORES.replace("B,", f"{batch},").replace("T,", f"{queries},").replace(f"{batch}, 2, 16", f"{batch}, {groups}, 16")
    wide, flat = np.array([batch, groups, 6 // groups, 16, 4]), np.array([batch, 6, 16, 4])
    return common.ShapeInferencePass()(graph(text, two=np.array([2]), wide=wide, flat=flat)).model


def feed(batch: int, queries: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    shapes = {"q": (batch, 6, queries, 4), "k": (batch, 2, 16, 4), "v": (batch, 2, 16, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_grouped_attention_is_the_same(batch: int, queries: int) -> None:
    before, after = attention(batch, queries), attention(batch, queries)
    assert GroupQueryHeadsPass()(after).modified
    common.RemoveUnusedNodesPass()(after)
    assert "Expand" not in operators(after) and operators(after).count("MatMul") == 2
    x = feed(batch, queries)
    np.testing.assert_allclose(run(after, x)[0], run(before, x)[0], rtol=0, atol=1e-6)
    other = {**x, "k": x["k"][:, ::-1].copy()}
    assert np.abs(run(after, other)[0] - run(before, x)[0]).max() > 1e-2  # heads that go to the wrong group would be seen


def test_a_prompt_keeps_the_form_that_is_faster_there() -> None:
    assert not GroupQueryHeadsPass()(attention(1, 5)).modified


def test_heads_that_are_not_shared_are_left_alone() -> None:
    assert not GroupQueryHeadsPass()(attention(1, 1, groups=6)).modified
