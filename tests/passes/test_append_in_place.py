from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from numpy.typing import NDArray

from tests.passes._models import graph, operators, run
from tmc_export.passes.append_in_place import AppendInPlacePass

TEXT = """(int64[B, 1] order, bool[B, 1] valid, int64[B, 4] past_order, bool[B, 4] past_valid, float[B, 2, 1, 3] new,
  float[B, 2, 4, 3] "past_key_values.0.key") => (int64[B, 5] o, bool[B, 5] a, float[B, 2, 5, 3] k, float[B, 2, 1, 3] "present.0.key") {
  oc = Concat<axis = 1>(past_order, order)  o = Neg(oc)  vc = Concat<axis = 1>(past_valid, valid)  a = Not(vc)
  "present.0.key" = Neg(new)  kc = Concat<axis = 2>("past_key_values.0.key", "present.0.key")  k = Neg(kc)
}"""


def model(batch: int) -> ir.Model:
    return common.ShapeInferencePass()(graph(TEXT.replace("[B", f"[{batch}"))).model


def feed(batch: int, slots: int, filled: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    past = np.zeros((batch, 2, slots, 3), np.float32)
    past[:, :, :filled] = rng.standard_normal((batch, 2, filled, 3))
    return {
        "order": np.full((batch, 1), 9), "valid": np.ones((batch, 1), np.bool_),
        "new": rng.standard_normal((batch, 2, 1, 3)).astype(np.float32),
        "past_order": np.tile(np.arange(slots), (batch, 1)), "past_valid": np.tile(np.arange(slots) < filled, (batch, 1)),
        "past_key_values.0.key": past,
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
def test_the_new_row_goes_into_the_first_free_slot(batch: int) -> None:
    before, after = model(batch), model(batch)
    assert AppendInPlacePass()(after).modified
    assert [v.name for v in after.graph.outputs] == ["o", "a", "k", "slots.0.key"] and "Concat" not in [
        n.op_type for n in after.graph if n.outputs[0].name in ("oc", "vc", "kc")
    ]
    want = run(before, feed(batch, 4, 4))  # the older form, its slots full: the new row comes behind them
    got = run(after, feed(batch, 5, 4))
    for one, other in zip(got[:3], want[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    earlier = run(after, feed(batch, 5, 2))
    assert np.abs(earlier[2] - got[2]).max() > 0.1
    np.testing.assert_array_equal(earlier[2][:, :, 2], feed(batch, 5, 2)["new"][:, :, 0])
    assert earlier[1][0].tolist() == [False, False, False, True, True] and earlier[0][0].tolist() == [0, -1, -9, -3, -4]


def test_every_sequence_has_its_own_free_slot() -> None:
    """Three sequences of two heads, filled differently."""
    after, filled = model(3), (0, 2, 4)
    AppendInPlacePass()(after)
    x = feed(3, 5, 4)
    x["past_valid"] = np.arange(5)[None] < np.array(filled)[:, None]
    got, want = run(after, x)[3], x["past_key_values.0.key"].copy()
    for sequence, slot in enumerate(filled):
        want[sequence, :, slot] = -x["new"][sequence, :, 0]
    np.testing.assert_array_equal(got, want)


def test_the_filled_slots_are_what_was_read_with_one_row_more() -> None:
    after = model(1)
    AppendInPlacePass()(after)
    x = feed(1, 5, 3)
    slots = run(after, x)[3]
    x["past_key_values.0.key"][:, :, 3] = -x["new"][:, :, 0]
    np.testing.assert_array_equal(slots, x["past_key_values.0.key"])


def test_a_graph_of_several_tokens_is_left_alone() -> None:
    text = "(bool[1, 2] valid, bool[1, 4] past_valid) => (bool[1, 6] a) { vc = Concat<axis = 1>(past_valid, valid)  a = Not(vc) }"
    several = graph(text)
    assert not AppendInPlacePass()(several).modified and operators(several) == ["Concat", "Not"]
