from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from numpy.typing import NDArray

from tests.passes._models import graph, operators, run
from tmc_export.core.errors import ExportError
from tmc_export.passes.append_in_place import AppendInPlacePass
from tmc_export.passes.quantize_slots import QuantizeSlotsPass

BLOCK = """(float[1, 2, 3, 4] new, float[1, 2, 5, 4] "past_key_values.0.key")
  => (float[1, 2, 8, 4] seen, float[1, 2, 3, 4] "present.0.key") {
  "present.0.key" = Neg(new)  all = Concat<axis = 2>("past_key_values.0.key", "present.0.key")  seen = Neg(all)
}"""
CUT = """(float[1, 2, 5, 4] "key.3", float[1, 2, 3, 4] new, float[1, 2, 5, 4] "next_key.4") => (float[1, 2, 5, 4] a, float[1, 2, 8, 4] b) {
  a = Neg("key.3")  n = Neg(new)  all = Concat<axis = 2>("next_key.4", n)  b = Neg(all)
}"""
STEP = """(int64[1, 1] order, bool[1, 1] valid, int64[1, 4] past_order, bool[1, 4] past_valid, float[1, 2, 1, 3] new,
  float[1, 2, 4, 3] "past_key_values.0.key") => (int64[1, 5] o, bool[1, 5] a, float[1, 2, 5, 3] k, float[1, 2, 1, 3] "present.0.key") {
  oc = Concat<axis = 1>(past_order, order)  o = Neg(oc)  vc = Concat<axis = 1>(past_valid, valid)  a = Not(vc)
  "present.0.key" = Neg(new)  kc = Concat<axis = 2>("past_key_values.0.key", "present.0.key")  k = Neg(kc)
}"""
SCALES = np.array([0.5, 0.25], np.float32)
WIDE = SCALES[None, :, None, None]


def model(text: str) -> ir.Model:
    return common.ShapeInferencePass()(graph(text)).model


def codes(rows: NDArray[Any]) -> NDArray[Any]:
    return np.clip(np.rint(rows / WIDE), -128, 127).astype(np.int8)


def draw(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 30


def test_new_rows_are_returned_as_codes_and_seen_as_codes() -> None:
    after = model(BLOCK)
    assert QuantizeSlotsPass({"0.key": SCALES})(after).modified
    assert [v.name for v in after.graph.outputs] == ["seen", "present.0.key"]
    assert after.graph.outputs[1].dtype is ir.DataType.INT8 and after.graph.inputs[1].dtype is ir.DataType.INT8
    new, past = draw(1, 2, 3, 4), codes(draw(1, 2, 5, 4)[::-1])
    seen, present = run(after, {"new": new, "past_key_values.0.key": past})
    np.testing.assert_array_equal(present, codes(-new))
    np.testing.assert_array_equal(seen, -np.concatenate([past, codes(-new)], 2).astype(float) * WIDE)
    assert present.min() == -128 and np.abs(seen[:, :, 5:] - new).max() > 0.1  # clipped, and rounded: not the rows as they were


def test_who_asks_for_the_shape_alone_is_left_alone() -> None:
    text = BLOCK.replace(") {\n", ', int64[4] size) {\n  size = Shape("past_key_values.0.key")')
    after = model(text)
    QuantizeSlotsPass({"0.key": SCALES})(after)
    x = {"new": draw(1, 2, 3, 4), "past_key_values.0.key": codes(draw(1, 2, 5, 4))}
    seen, present, size = run(after, x)
    assert present.dtype == np.int8 and seen.dtype == np.float32 and size.tolist() == [1, 2, 5, 4]


def test_scales_of_another_head_are_seen() -> None:
    right, wrong = model(BLOCK), model(BLOCK)
    QuantizeSlotsPass({"0.key": SCALES})(right)
    QuantizeSlotsPass({"0.key": SCALES[::-1].copy()})(wrong)
    x = {"new": draw(1, 2, 3, 4), "past_key_values.0.key": codes(draw(1, 2, 5, 4))}
    assert np.abs(run(right, x)[0] - run(wrong, x)[0]).max() > 1


def test_a_compress_graph_reads_both_layers_slots() -> None:
    after = model(CUT)
    QuantizeSlotsPass({"3.key": SCALES, "4.key": SCALES * 2})(after)
    assert operators(after).count("QuantizeLinear") == 1 and operators(after).count("DequantizeLinear") == 2
    past, new, ahead = codes(draw(1, 2, 5, 4)), draw(1, 2, 3, 4), codes(draw(1, 2, 5, 4) / 3)
    a, b = run(after, {"key.3": past, "new": new, "next_key.4": ahead})
    np.testing.assert_array_equal(a, -past.astype(float) * WIDE)
    np.testing.assert_array_equal(b, -np.concatenate([ahead, codes(-new / 2)], 2).astype(float) * WIDE * 2)


def test_a_decode_graph_fills_codes_in_place() -> None:
    after = model(STEP)
    QuantizeSlotsPass({"0.key": SCALES})(after)
    AppendInPlacePass()(after)
    assert [v.name for v in after.graph.outputs] == ["o", "a", "k", "slots.0.key"] and after.graph.outputs[3].dtype is ir.DataType.INT8
    past, new = codes(draw(1, 2, 5, 3)), draw(1, 2, 1, 3)
    x = {"order": np.full((1, 1), 9), "valid": np.ones((1, 1), np.bool_), "past_order": np.arange(5)[None], "new": new}
    _, _, k, slots = run(after, {**x, "past_valid": (np.arange(5) < 2)[None], "past_key_values.0.key": past})
    past[:, :, 2] = codes(-new)[:, :, 0]
    np.testing.assert_array_equal(slots, past)
    np.testing.assert_array_equal(k, -past.astype(float) * WIDE)


def test_what_is_refused() -> None:
    with pytest.raises(ExportError, match=r"'past_key_values\.0\.key' has no scales; scales were found for: 1\.key"):
        QuantizeSlotsPass({"1.key": SCALES})(model(BLOCK))
    other = BLOCK.replace(
        'all = Concat<axis = 2>("past_key_values.0.key", "present.0.key")', 'all = Concat<axis = 2>("past_key_values.0.key", new)'
    )
    alone = BLOCK.replace('all = Concat<axis = 2>("past_key_values.0.key", "present.0.key")', 'all = Identity("past_key_values.0.key")')
    with pytest.raises(ExportError, match=r"'past_key_values\.0\.key' is not read by the one Concat"):
        QuantizeSlotsPass({"0.key": SCALES})(graph(alone))
    with pytest.raises(ExportError, match=r"'present\.0\.key' is not what is put behind the slots"):
        QuantizeSlotsPass({"0.key": SCALES})(model(other))


def test_a_graph_without_slots_is_left_alone() -> None:
    plain = graph("(float[1, 4] x) => (float[1, 4] y) { y = Neg(x) }")
    assert not QuantizeSlotsPass({"0.key": SCALES})(plain).modified and operators(plain) == ["Neg"]
