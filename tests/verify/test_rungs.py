"""Rungs and ladders: nothing passes that compared nothing, and the first bad subgraph is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tmc_export.core.errors import ParityError
from tmc_export.verify.compare import Check, compare_tensor
from tmc_export.verify.rungs import Ladder, Rung, not_run, rung_of
from tmc_export.verify.tolerances import TOLERANCES

TABLE = TOLERANCES["end_to_end", "float32"]
GOOD = compare_tensor("one/hidden", np.ones(3), np.ones(3), TABLE, "onnx/block_0_prefill.onnx")
BAD = compare_tensor("one/hidden", np.zeros(3), np.ones(3), TABLE, "onnx/block_1_prefill.onnx")


def test_a_rung_is_as_good_as_its_worst_check() -> None:
    assert rung_of("r", [GOOD, GOOD]).status == "passed"
    failed = rung_of("r", [GOOD, BAD])
    assert failed.status == "failed" and failed.failures == (BAD,) and "1 of 2 checks" in failed.line()


def test_nothing_compared_is_a_failure() -> None:
    assert rung_of("r", []).status == "failed"
    tie = Check("one/kept", "onnx/compress_1.onnx", True, "a tie", exceptions=("one/kept: 1 instead of 2",))
    only_ties = rung_of("r", [tie, Check("one/logits", None, True, "left out")])
    assert only_ties.status == "failed" and "nothing could be compared" in only_ties.note
    some = rung_of("r", [tie, GOOD])
    assert some.status == "passed" and "1 ties" in some.line() and some.exceptions == tie.exceptions


def test_not_run_is_said_and_is_no_pass() -> None:
    ladder = Ladder((not_run("a", "no checkpoint"), not_run("b", "no GPU")))
    assert not ladder.passed and ladder.text() == "a: not run: no checkpoint\nb: not run: no GPU"
    with pytest.raises(ParityError, match="parity was not shown"):
        ladder.raise_if_failed()
    Ladder((not_run("a", "no checkpoint"), rung_of("b", [GOOD]))).raise_if_failed()


def test_the_first_bad_subgraph_is_named() -> None:
    whole = Check("one/logits", None, False, "differs by 1")
    ladder = Ladder((Rung("files", "passed"), rung_of("end", [GOOD, whole]), rung_of("subgraphs", [GOOD, BAD])))
    assert ladder.first_bad == BAD, "a subgraph says more than the whole, wherever it failed"
    with pytest.raises(ParityError, match=r"the first bad subgraph is onnx/block_1_prefill\.onnx: one/hidden: differs by 1"):
        ladder.raise_if_failed()
    with pytest.raises(ParityError, match="no single subgraph is to blame: one/logits"):
        Ladder((rung_of("end", [GOOD, whole]),)).raise_if_failed()


def test_what_is_told() -> None:
    ladder = Ladder((Rung("files", "passed", "3 files"), rung_of("end", [GOOD, *[BAD] * 7]), not_run("TensorRT", "no GPU")))
    text = ladder.text()
    assert text.count("failed: one/hidden (onnx/block_1_prefill.onnx)") == 5 and "and 2 more" in text
    data = json.loads(json.dumps(ladder.to_json()))
    assert data["passed"] is False and data["first_bad"]["subgraph"] == "onnx/block_1_prefill.onnx"
    assert [r["status"] for r in data["rungs"]] == ["passed", "failed", "not run"] and len(data["rungs"][1]["failures"]) == 7
    assert ladder.proofs()["files"] == "passed; 3 files"
