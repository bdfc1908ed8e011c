"""Fitting by hand: FitPrune's table and VTW's layer on made-up evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Attention, Method, Need, Site, Stage
from tmc_export.graphs._fitting import Option, Visit
from tmc_export.graphs._synthetic import FACTS
from tmc_export.graphs.fitprune import FitPrune, spared
from tmc_export.graphs.vtw import VTW


def small(layers: int) -> object:
    return replace(FACTS, decoder=replace(FACTS.decoder, layers=layers))


class Made:
    """Prompts whose candidates have the same sums in every layer; a layer's price is its tokens."""

    def __init__(self, *prompts: tuple[list[float], list[float]], divergences: Mapping[str, float] | None = None) -> None:
        self.sums, self.divergences = prompts, divergences or {}
        self.asked: list[str] = []
        self.shrink = True

    @property
    def prompts(self) -> int:
        return len(self.sums)

    def look(self, stages: Sequence[Stage], visit: Visit) -> None:
        for number, (own, cross) in enumerate(self.sums):
            left = torch.arange(len(own))
            for stage in stages:
                rows = len(left) if self.shrink else len(own)  # a sum over visual rows shrinks with the rows, its mean does not
                captured: dict[Need, Tensor] = {}
                for need in stage.needs:
                    assert isinstance(need, Attention) and (need.heads, need.row_sum, need.layer) == ("max", True, "previous")
                    captured[need] = torch.tensor(own)[left] * rows if need.rows == "visual" else torch.tensor(cross)[left]
                kept = visit(number, stage, captured)
                left = left if kept is None else left[kept]

    def divergence(self, at: Site, options: Mapping[str, Option]) -> float:
        self.asked.append(str(at))
        return self.divergences[str(at)]

    def operations(self, at: Site, options: Mapping[str, Option]) -> float:
        delete = options["delete"]
        assert isinstance(delete, tuple) and str(at) == f"decoder.{next(i for i, d in enumerate(delete) if d) + 1}"
        tokens = [4 - sum(delete[:layer]) for layer in range(3)]
        return sum(tokens) / 12


# ------------------------------------------------------------------------------------------------------- one layer's deletions
@pytest.mark.parametrize(
    ("whole", "alpha", "kept"),
    [
        # own 1 2 3 4: of the smallest, left is 9, 7, 4, 0; cross 4 1 3 2: without 1, 3, 2, 0 in turn left is 9, 7, 4, 0
        ((10.0, 10.0), 0.5, [0, 2, 3]),  # at least 5 stay: {0, 1} and {1, 3}; both find 1 small
        ((10.0, 10.0), 0.25, [0, 1, 2, 3]),  # at least 7.5 stay: {0} and {1}; nothing is in both
        ((10.0, 10.0), 0.75, [0, 3]),  # at least 2.5 stay: {0, 1, 2} and {1, 3, 2}; 1 and 2 are in both
        ((20.0, 10.0), 0.5, [0, 1, 2, 3]),  # of the 20 that own had, 10 must stay: none may go
        ((10.0, 10.0), 1.0, [2]),  # all are small: the largest product, 9, stays
    ],
)
def test_what_both_sums_find_small_goes(whole: tuple[float, float], alpha: float, kept: list[int]) -> None:
    own, cross = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert spared(own, cross, whole, alpha).tolist() == kept


def test_of_equal_sums_the_lowest_index_goes() -> None:
    same = torch.ones(4)
    assert spared(same, same, (4.0, 4.0), 0.5).tolist() == [2, 3]


# ------------------------------------------------------------------------------------------------------- the table
# A gives up 1, 2, 3 of its 4 tokens from alpha 0.1, 0.3, 0.6 on, B from 0.1, 0.2, 0.3 on: left of 10 is 9, 7, 4 and 9, 8, 7.
A = ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
B = ([1.0, 1.0, 1.0, 7.0], [1.0, 1.0, 1.0, 7.0])


def test_the_smallest_alpha_that_meets_the_goal() -> None:
    # Deleting d in layer 0 leaves (12 - 2d) / 12 of the three layers: 70 % needs d = 2. A and B give 1 and 2 from 0.2 on, which is 1.5 and
    # rounded down 1; 2 and 3, rounded down 2, from 0.3 on. The next 256th is 77 / 256.
    found = FitPrune.fit(FitPrune.Config(), small(3), Made(A, B), {"flops": 0.7})  # type: ignore[arg-type]
    assert (str(found.at), dict(found.options)) == ("decoder.1", {"delete": (2,)})
    assert found.rows == (("0", "2"), ("alpha", f"{77 / 256:.4f}"), ("operations left", "66.7%"))


def test_prompts_count_alike() -> None:
    # B alone gives 2 from 0.2 on; the next 256th is 52 / 256
    found = FitPrune.fit(FitPrune.Config(), small(3), Made(B), {"flops": 0.7})  # type: ignore[arg-type]
    assert found.rows[1] == ("alpha", f"{52 / 256:.4f}")


def test_fewer_visual_rows_are_no_smaller_attention() -> None:
    # The goal needs 1 deletion, which layer 0 gives from alpha 0.1 on (own 1 of 10). The three tokens that are left have means 2, 3, 4: 9
    # of 10, and without the 2 it is 7: layer 1 gives up none, though its sums over three rows are 6, 9, 12 against 4, 8, 12, 16 before.
    # The twin's sums stay 8, 12, 16 over three rows, means of 8/3, 4, 16/3: without the first 9.3 of 10 are left, and it goes.
    deleted: list[int] = []
    for shrink in (True, False):
        made = Made((A[0], [0.1, 0.2, 30.0, 40.0]))
        made.shrink = shrink
        found = FitPrune.fit(FitPrune.Config(), small(3), made, {"flops": 0.9})  # type: ignore[arg-type]
        deleted.append(len(found.options["delete"]))  # type: ignore[arg-type]
    assert deleted == [1, 2]


def test_a_goal_out_of_reach_says_what_can_be_had() -> None:
    with pytest.raises(ValueError, match=r"flops: 40.0% .* 50.0% can; ask for more"):  # 3 of 4 deleted: 6 / 12
        FitPrune.fit(FitPrune.Config(), small(3), Made(A), {"flops": 0.4})  # type: ignore[arg-type]


def test_one_layer_is_too_few() -> None:
    with pytest.raises(ValueError, match="1 layer"):
        FitPrune.fit(FitPrune.Config(), small(1), Made(A), {"flops": 0.5})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- VTW
LAYERS = {"decoder.1": 0.5, "decoder.2": 0.01, "decoder.3": 0.002}


def test_the_first_layer_below_the_bound() -> None:
    made = Made(A, divergences=LAYERS)
    found = VTW.fit(VTW.Config(), small(4), made, {"divergence": 0.02})  # type: ignore[arg-type]
    assert str(found.at) == "decoder.2" and not found.options and made.asked == ["decoder.1", "decoder.2"]
    assert found.rows == (("decoder.1", "0.500000"), ("decoder.2", "0.010000"))


def test_a_layer_at_the_bound_is_not_below_it() -> None:
    made = Made(A, divergences=LAYERS)
    assert str(VTW.fit(VTW.Config(), small(4), made, {"divergence": 0.01}).at) == "decoder.3"  # type: ignore[arg-type]


def test_no_layer_below_the_bound() -> None:
    with pytest.raises(ValueError, match=r"below 0.001 at no layer \(decoder.1 0.500000, .*; ask for more"):
        VTW.fit(VTW.Config(), small(4), Made(A, divergences=LAYERS), {"divergence": 0.001})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- what methods declare
@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_fitted_can_be_written(name: str) -> None:
    method = METHODS.get(name)
    assert bool(method.fitted) == bool(method.goals) == (method.fit is not Method.fit)
    assert set(method.fitted) <= {"at", *method.Config.model_fields}
    assert set(method.goals) <= {"flops", "divergence"}  # what `tmc-export fit` can be given
