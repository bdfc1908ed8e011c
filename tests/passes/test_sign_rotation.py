from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from tests.passes._models import graph, operators, run
from tmc_export.passes.sign_rotation import SignRotationPass

ROTARY = """(float[1, 2, 3, 4] q, float[1, 1, 3, 4] k, float[1, 1, 3, 4] a) => (float[1, 2, 3, 4] x, float[1, 1, 3, 4] y) {
  s = Sin(a)
  q1 = Slice(q, zero, two, last)  q2 = Slice(q, two, four, last)  qn = Neg(q2)  qr = Concat<axis = -1>(qn, q1)  x = Mul(qr, s)
  k1 = Slice(k, zero, two, last)  k2 = Slice(k, two, four, last)  kn = Neg(k2)  kr = Concat<axis = 3>(kn, k1)  y = Mul(s, kr)
}"""


def rotary(text: str = ROTARY) -> ir.Model:
    numbers = {"zero": np.array([0]), "two": np.array([2]), "four": np.array([4]), "last": np.array([-1])}
    return common.ShapeInferencePass()(graph(text, **numbers)).model


def test_the_sign_moves_to_the_sine_which_is_signed_once() -> None:
    before, after = rotary(), rotary()
    assert SignRotationPass()(after).modified
    assert "Neg" not in operators(after) and operators(after).count("Mul") == 3
    rng = np.random.default_rng(0)
    feed = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("q", (1, 2, 3, 4)), ("k", (1, 1, 3, 4)), ("a", (1, 1, 3, 4)))}
    for got, want in zip(run(after, feed), run(before, feed), strict=True):
        assert got.tobytes() == want.tobytes()
    other = run(after, {**feed, "a": -feed["a"]})[0]
    assert np.abs(other - run(before, feed)[0]).max() > 0.1  # a lost sign would be seen


def test_a_concatenation_along_another_axis_is_left_alone() -> None:
    text = ROTARY.replace("Concat<axis = -1>(qn, q1)", "Concat<axis = 1>(qn, qn)").replace("x = Mul(qr, s)", "x = Identity(q)")
    model = rotary(text.replace("Concat<axis = 3>(kn, k1)", "Concat<axis = 3>(k2, k1)"))
    assert not SignRotationPass()(model).modified
