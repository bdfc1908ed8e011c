"""The rewrite of `quantize_slots` for fp8 codes, against numbers rounded by ml_dtypes and by torch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.passes._models import operators, run
from tests.passes.test_quantize_slots import BLOCK, CUT, SCALES, STEP, WIDE, draw, model
from tmc_export.core.errors import ExportError
from tmc_export.passes.append_in_place import AppendInPlacePass
from tmc_export.passes.quantize_slots import QuantizeSlotsPass

FP8 = ir.DataType.FLOAT8E4M3FN


def rewritten(text: str, scales: dict[str, NDArray[Any]]) -> ir.Model:
    after = model(text)
    assert QuantizeSlotsPass(scales, FP8)(after).modified
    return after


def codes(rows: NDArray[Any]) -> NDArray[Any]:
    return np.clip(rows / WIDE, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def numbers(found: NDArray[Any]) -> NDArray[Any]:
    return found.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def test_new_rows_are_returned_as_codes_and_seen_as_codes() -> None:
    after = rewritten(BLOCK, {"0.key": SCALES})
    assert [v.name for v in after.graph.outputs] == ["seen", "present.0.key"]
    assert after.graph.outputs[1].dtype is FP8 and after.graph.inputs[1].dtype is FP8
    (joined,) = (n for n in after.graph if n.op_type == "Concat")
    assert {v.dtype for v in (*joined.inputs, *joined.outputs) if v is not None} == {ir.DataType.FLOAT}  # ONNX joins no fp8
    new, past = draw(1, 2, 3, 4) * 10, codes(draw(1, 2, 5, 4)[::-1])
    seen, present = run(after, {"new": new, "past_key_values.0.key": past})
    np.testing.assert_array_equal(present, codes(-new))
    np.testing.assert_array_equal(seen, -np.concatenate([numbers(past), numbers(codes(-new))], 2) * WIDE)
    assert (present & 0x7F).max() == 0x7E and np.abs(seen[:, :, 5:] - new).max() > 0.1  # clipped, and rounded: not the rows as they were


def test_every_number_half_way_between_two_codes_goes_to_the_even_one() -> None:
    torch = pytest.importorskip("torch")
    each = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    halves, ends = (each[1:] + each[:-1]) / 2, [0.0, 448.0, 463.9, 464.0, 465.0, 1e30, 2.0**-10, 2.0**-10 * 1.001]
    all_of_them = np.concatenate([each, halves, ends]).astype(np.float32)
    new = np.stack([all_of_them, -all_of_them])[None, :, :, None] * WIDE
    text = BLOCK.replace("1, 2, 3, 4", f"1, 2, {len(all_of_them)}, 1").replace("1, 2, 5, 4", "1, 2, 5, 1")
    text = text.replace("1, 2, 8, 4", f"1, 2, {len(all_of_them) + 5}, 1")
    _, present = run(rewritten(text, {"0.key": SCALES}), {"new": new, "past_key_values.0.key": np.zeros((1, 2, 5, 1), np.uint8)})
    theirs = torch.from_numpy(-new / WIDE).clamp(-448, 448).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(present, theirs.view(torch.uint8).numpy())
    np.testing.assert_array_equal(present, codes(-new))


def test_scales_of_another_head_are_seen() -> None:
    right, wrong = rewritten(BLOCK, {"0.key": SCALES}), rewritten(BLOCK, {"0.key": SCALES[::-1].copy()})
    x = {"new": draw(1, 2, 3, 4), "past_key_values.0.key": codes(draw(1, 2, 5, 4))}
    assert np.abs(run(right, x)[0] - run(wrong, x)[0]).max() > 1


def test_a_compress_graph_reads_both_layers_slots() -> None:
    after = rewritten(CUT, {"3.key": SCALES, "4.key": SCALES * 2})
    assert operators(after).count("QuantizeLinear") == 1 and operators(after).count("DequantizeLinear") == 3
    past, new, ahead = codes(draw(1, 2, 5, 4)), draw(1, 2, 3, 4), codes(draw(1, 2, 5, 4) / 3)
    a, b = run(after, {"key.3": past, "new": new, "next_key.4": ahead})
    np.testing.assert_array_equal(a, -numbers(past) * WIDE)
    np.testing.assert_array_equal(b, -np.concatenate([numbers(ahead), numbers(codes(-new / 2))], 2) * WIDE * 2)


def test_a_decode_graph_puts_its_row_into_what_was_widened_and_returns_its_codes() -> None:
    after = rewritten(STEP, {"0.key": SCALES})
    AppendInPlacePass()(after)
    assert [v.name for v in after.graph.outputs] == ["o", "a", "k", "present.0.key"] and after.graph.outputs[3].dtype is FP8
    past, new = codes(draw(1, 2, 5, 3)), draw(1, 2, 1, 3)
    x = {"order": np.full((1, 1), 9), "valid": np.ones((1, 1), np.bool_), "past_order": np.arange(5)[None], "new": new}
    _, _, k, present = run(after, {**x, "past_valid": (np.arange(5) < 2)[None], "past_key_values.0.key": past})
    np.testing.assert_array_equal(present, codes(-new))
    past[:, :, 2] = present[:, :, 0]
    np.testing.assert_array_equal(k, -numbers(past) * WIDE)


def test_widened_slots_that_something_else_reads_are_not_filled() -> None:
    after = rewritten(STEP, {"0.key": SCALES})
    widened = next(n for n in after.graph if n.op_type == "DequantizeLinear" and n.inputs[0] in after.graph.inputs)
    other = ir.node("Neg", [widened.outputs[0]])
    after.graph.append(other)
    after.graph.outputs.append(other.outputs[0])
    with pytest.raises(ExportError, match=r"'past_key_values\.0\.key' is not read by the one Concat that appends the new token"):
        AppendInPlacePass()(after)
