"""What a tie excuses, and what it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tmc_export.bundle.program import CutProgram
from tmc_export.verify._trace import StageTrace
from tmc_export.verify.play import is_tie

SCORES = np.array([0.9, 0.1, 0.5, 0.5000001, 0.0, 0.8], np.float32)
TRACE = StageTrace(0, "fastv", "decoder.2", 0, 1, 6, np.array([0, 3, 5]), np.array([0, 3, 5]), SCORES, 1.1e-7, False)
CUT = CutProgram(
    before_block=1, layer=2, file="onnx/compress_1.onnx", tokens_in=20, tokens_out=14, visual_in=12, visual_out=6, positions="keep",
    previous=True, next=False, methods=("fastv",),
)  # fmt: skip


def test_only_tokens_at_the_threshold_are_exchanged() -> None:
    assert TRACE.excuses(np.array([0, 2, 5]), 1e-5)
    assert not TRACE.excuses(np.array([0, 4, 5]), 1e-5), "token 4 scores nothing"
    assert not TRACE.excuses(np.array([2, 3, 5]), 1e-5), "token 0 was far above the threshold"
    assert not TRACE.excuses(np.array([0, 3, 17]), 1e-5), "there is no token 17"
    assert TRACE.excuses(np.array([0, 1, 5]), 0.5), "a wider bound, as for 4-bit weights"


def test_no_tie_excuses_nothing_but_equality() -> None:
    clear = replace(TRACE, margin=0.2)
    assert clear.excuses(TRACE.kept, 1e-5) and not clear.excuses(np.array([0, 2, 5]), 1e-5)


def test_after_an_earlier_stage_original_places_say_nothing_about_scores() -> None:
    later = replace(TRACE, source=np.array([10, 13, 15]))
    other = np.array([10, 12, 15])
    assert later.excuses_source(other, 1e-5) and not replace(later, margin=0.2).excuses_source(other, 1e-5)


def test_one_pictures_tie_excuses_no_other_picture() -> None:
    second = replace(TRACE, picture=2, margin=0.2)
    right, other = np.array([0, 3, 5, 6, 9, 11]), np.array([0, 2, 5, 6, 9, 11])
    assert is_tie([TRACE, second], right, CUT, 2, 1e-5) and is_tie([TRACE, second], other, CUT, 2, 1e-5)
    assert not is_tie([TRACE, second], np.array([0, 3, 5, 6, 8, 11]), CUT, 2, 1e-5), "the second picture's choice was clear"
    assert not is_tie([TRACE, second], None, CUT, 2, 1e-5)
