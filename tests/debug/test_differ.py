"""When two tensors differ, and which node is the first."""

from __future__ import annotations

import numpy as np
import pytest

from tmc_export.debug.differ import bound, compare, wrong_nodes

TABLE = bound("float32", 1e-3)
ONES = np.ones(4, np.float32)


def test_within_and_beyond_the_tolerance() -> None:
    assert compare("t", ONES, ONES, TABLE) is None
    assert compare("t", ONES * np.float32(1.0009), ONES, TABLE) is None
    found = compare("t", ONES * np.float32(1.01), ONES, TABLE)
    assert found is not None and found.error == pytest.approx(0.01, rel=1e-4) and found.allowed == pytest.approx(1e-3, rel=2e-3)


def test_one_scale_per_tensor() -> None:
    """A small element beside large ones carries their rounding."""
    assert compare("t", np.array([1000, 0.5], np.float32), np.array([1000, 0.1], np.float32), TABLE) is None


@pytest.mark.parametrize(
    ("got", "want", "says"),
    [
        (None, ONES, "is missing"),
        (ONES[:3], ONES, "has shape [3], not [4]"),
        (np.array([1, 1, 1, np.nan], np.float32), ONES, "1 of 4 values are not finite"),
        (ONES, np.array([1, 1, 1, np.inf], np.float32), "not finite"),
        (np.array([1, 2]), np.array([1, 3]), "differs in 1 of 2 places"),
        (np.array([True, False]), np.array([True, True]), "differs in 1 of 2 places"),
    ],
)
def test_what_is_no_small_difference(got: np.ndarray | None, want: np.ndarray, says: str) -> None:
    found = compare("t", got, want, TABLE)
    assert found is not None and says in found.note


def test_codes_may_be_the_next_one() -> None:
    """What lies half-way between two int8 codes is either; other integers are what they are."""
    codes = np.array([3, -128, 127], np.int8)
    assert compare("t", codes + np.array([1, 1, 0], np.int8), codes, TABLE) is None
    found = compare("t", codes + np.array([2, 0, 0], np.int8), codes, TABLE)
    assert found is not None and (found.error, found.allowed) == (2.0, 1.0) and found.note == "differs in 1 of 3 places"
    assert compare("t", codes.astype(np.int64) + 1, codes.astype(np.int64), TABLE) is not None


def test_bytes_of_slots_are_fp8_codes() -> None:
    """Sign and magnitude: the neighbours of 0 are the smallest numbers of either sign, and there are two zeros. Other bytes are numbers."""
    codes = np.array([0x00, 0x38, 0xB8, 0x7E], np.uint8)
    assert compare("present.0.key", np.array([0x81, 0x39, 0xB7, 0x7E], np.uint8), codes, TABLE) is None
    found = compare("present.0.key", np.array([0x82, 0x38, 0xB8, 0x7E], np.uint8), codes, TABLE)
    assert found is not None and (found.error, found.allowed) == (2.0, 1.0) and found.note == "differs in 1 of 4 places"
    assert compare("x.codes", codes + np.uint8(1), codes, TABLE) is not None


def test_the_same_infinity_is_equal() -> None:
    both = np.array([-np.inf, 1], np.float32)
    assert compare("t", both, both.copy(), TABLE) is None
    assert compare("t", both, -both, TABLE) is not None


def test_a_given_tolerance_replaces_the_tables() -> None:
    assert bound("float32", None).rtol == 2e-5 and bound("int4", None).rtol == 0.5
    assert bound("int4", 0.01).rtol == 0.01 and bound("int4", 1e-6).atol == 1e-6


def test_wrong_nodes_come_in_order_and_unknown_names_are_passed_over() -> None:
    pytest.importorskip("onnx")
    from tests.debug._graphs import branches

    right = {name: ONES for name in "abcdefghy"} | {"side": ONES}
    wrong = {**right, "e": ONES * 2, "g": ONES * 3}
    assert [index for index, _ in wrong_nodes(branches(), wrong, right, TABLE)] == [5, 7]
    assert [index for index, _ in wrong_nodes(branches(), wrong, {n: v for n, v in right.items() if n != "e"}, TABLE)] == [7]
    assert list(wrong_nodes(branches(), right, right, TABLE)) == []
