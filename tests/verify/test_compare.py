"""Comparisons: what passes, what does not, and the figures beside it."""

from __future__ import annotations

import numpy as np
import pytest

from tmc_export.core.errors import ParityError
from tmc_export.verify.compare import Check, compare_indices, compare_logits, compare_outputs, compare_tensor, measure, worst
from tmc_export.verify.tolerances import MARGINS, TOLERANCES, Tolerance, margin_bound, tolerance

TIGHT = Tolerance(rtol=1e-3, atol=0.0, sqnr_db=60, kl=1e-6, same_tokens=True, reason="by hand")


def test_figures_are_those_computed_by_hand() -> None:
    got, want = np.array([3.0, 4.1]), np.array([3.0, 4.0])
    figures = measure(got, want)
    assert figures.max_abs == pytest.approx(0.1) and figures.max_rel == pytest.approx(0.025)
    assert figures.cosine == pytest.approx((9 + 16.4) / (5 * np.hypot(3, 4.1)))
    assert figures.sqnr_db == pytest.approx(10 * np.log10(25 / 0.01))
    equal = measure(want, want)
    assert equal.max_abs == 0 and equal.cosine == pytest.approx(1) and equal.sqnr_db == float("inf")
    assert equal.to_json()["sqnr_db"] == "inf"
    assert measure(np.ones(2), np.zeros(2)).max_rel == 1.0


def test_one_element_is_enough_to_fail() -> None:
    want = np.linspace(-1, 1, 10_000, dtype=np.float32).reshape(100, 100)
    got = want.copy()
    assert compare_tensor("t", got, want, TIGHT).passed
    got[37, 5] += 2e-3
    check = compare_tensor("t", got, want, TIGHT, "onnx/x.onnx")
    assert not check.passed and "[37, 5]" in check.note and check.subgraph == "onnx/x.onnx"
    assert measure(got, want).cosine > 0.999999, "a mean would not have seen it"


def test_noise_in_every_element_fails_by_its_power() -> None:
    want = np.zeros(10_000, np.float32)
    want[0] = 1.0
    got = want + np.float32(9e-4) * np.where(np.arange(10_000) % 2, 1, -1).astype(np.float32)
    check = compare_tensor("t", got, want, TIGHT)
    assert not check.passed and "SQNR" in check.note


@pytest.mark.parametrize("got", [None, np.zeros((2, 2), np.float32), np.array([1.0, np.nan, 3.0]), np.array([1.0, np.inf, 3.0])])
def test_missing_misshapen_and_not_finite(got: np.ndarray | None) -> None:
    want = np.array([1.0, 2.0, 3.0])
    assert not compare_tensor("t", got, want, TOLERANCES["end_to_end", "int4"]).passed
    assert not compare_logits("t", got, want, TOLERANCES["end_to_end", "int4"]).passed


def test_a_name_that_is_expected_and_missing_fails() -> None:
    want = {"a": np.ones(2), "b": np.ones(2)}
    checks = compare_outputs("block", {"a": np.ones(2), "c": np.ones(2)}, want, TIGHT)
    assert [(c.name, c.passed) for c in checks] == [("block/a", True), ("block/b", False)]
    assert checks[1].note == "the output is missing"


def test_logits_by_token_and_by_divergence() -> None:
    loose = Tolerance(rtol=0.2, atol=0.0, sqnr_db=0, kl=10, same_tokens=True, reason="by hand")
    want = np.array([[5.0, 0.0, 0.0], [5.0, 4.9, 0.0]])
    near = np.array([[5.0, 0.0, 0.0], [4.9, 5.0, 0.0]])
    check = compare_logits("l", near, want, loose)
    assert check.passed and check.metrics is not None and check.metrics.top1 == 0.5 and "1 of 2 tokens" in check.note
    clear = Tolerance(rtol=0.05, atol=0.0, sqnr_db=0, kl=1e-3, same_tokens=True, reason="by hand")
    shifted = want + np.array([[0.0, 0.2, -0.2]])
    divergent = compare_logits("l", shifted, want, clear)
    assert not divergent.passed and "KL" in divergent.note
    p, q = np.exp(want[1]) / np.exp(want[1]).sum(), np.exp(near[1]) / np.exp(near[1]).sum()
    assert check.metrics.kl == pytest.approx(float((p * np.log(p / q)).sum()))


def test_another_token_where_the_two_best_are_apart() -> None:
    table = Tolerance(rtol=0.2, atol=0.0, sqnr_db=-100, kl=100, same_tokens=True, reason="by hand")
    want = np.array([[0.0, 0.0, 10.0], [3.0, 0.0, -10.0]])
    wrong = compare_logits("l", np.array([[0.0, 0.0, 10.0], [1.4, 1.6, -10.0]]), want, table)
    assert not wrong.passed and "another token at step 1" in wrong.note, "every element is within 2.0, and the two best are 3.0 apart"
    want[1, 0] = 1.5
    near = compare_logits("l", np.array([[0.0, 0.0, 10.0], [0.7, 0.8, -10.0]]), want, table)
    assert near.passed and "1 of 2 tokens" in near.note, "1.5 apart is within the tolerance"


def test_indices_are_equal_or_a_tie_that_is_said() -> None:
    want = np.array([1, 4, 7])
    assert compare_indices("k", np.array([1, 4, 7]), want, tied=False).passed
    other = np.array([1, 4, 8])
    wrong = compare_indices("k", other, want, tied=False, margin=0.5)
    assert not wrong.passed and "[8]" in wrong.note and "[7]" in wrong.note
    tie = compare_indices("k", other, want, tied=True, margin=1e-7)
    assert tie.passed and len(tie.exceptions) == 1 and "1e-07" in tie.exceptions[0]
    assert not compare_indices("k", None, want, tied=True).passed, "a missing output is no tie"
    assert not compare_indices("k", np.array([1, 4]), want, tied=True).passed, "another count is no tie"
    assert not compare_indices("k", np.array([4, 1, 7]), want, tied=False).passed, "order counts"


def test_the_worst_of_several() -> None:
    checks = [compare_tensor("a", np.array([1.0]), np.array([1.0]), TIGHT), compare_tensor("b", np.array([1.5]), np.array([1.0]), TIGHT)]
    figures = worst([*checks, Check("c", None, True)])
    assert figures is not None and figures.max_abs == 0.5 and worst([Check("c", None, True)]) is None


def test_every_number_of_the_table_has_its_reason() -> None:
    assert all(len(t.reason) > 40 for t in TOLERANCES.values()) and all(len(why) > 40 for _, why in MARGINS.values())
    assert margin_bound("float32") == MARGINS["float32"][0]
    with pytest.raises(ParityError, match="no tolerance for rung 'eager' at precision 'int3'"):
        tolerance("eager", "int3")
    with pytest.raises(ParityError, match="no margin bound for precision 'int3'"):
        margin_bound("int3")
