"""The range recorder sees every float16 operator's output; no masks, no float32, and no memory that holds nothing yet."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tmc_export.verify.half import RangeRecorder  # noqa: E402


class Model(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False, dtype=torch.float16)
        self.inner.weight.data = torch.eye(4, dtype=torch.float16)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.inner(x * self.factor)
        masked = scores + torch.tensor([0.0, 0.0, -3e4, -3e4], dtype=torch.float16)
        return masked.softmax(-1)


@pytest.mark.parametrize(("factor", "near", "overflows"), [(1.0, False, False), (5e4, True, False), (7e4, True, True)])
def test_what_is_computed_inside_is_seen(factor: float, near: bool, overflows: bool) -> None:
    model = Model(factor)
    with torch.no_grad(), RangeRecorder({"inner": model.inner}) as recorder:
        model(torch.ones(1, 4, dtype=torch.float16))
    largest = recorder.ranges()[0]
    wanted = float("inf") if overflows else factor
    assert largest.largest == pytest.approx(wanted, rel=1e-3) and (largest.near, largest.overflows) == (near, overflows)
    assert any(r.place.startswith("inner: ") and r.largest == largest.largest for r in recorder.ranges())


def test_nan_is_an_overflow() -> None:
    with RangeRecorder({}) as recorder:
        torch.full((2,), 7e4).to(torch.float16) * 0
    assert recorder.ranges()[0].overflows and any("mul" in r.place and r.overflows for r in recorder.ranges())


def test_what_is_computed_in_float32_on_purpose_is_left_alone() -> None:
    x = torch.full((4,), 1e3, dtype=torch.float16)
    with RangeRecorder({}) as recorder:
        squares = x.float().pow(2)
        (x * torch.rsqrt(squares.mean()).to(torch.float16)).sum()
    assert float(squares[0]) > 65504 and not recorder.ranges()[0].overflows


def test_memory_that_holds_nothing_yet_is_not_looked_at() -> None:
    with RangeRecorder({}) as recorder:
        block = torch.empty(1 << 16, dtype=torch.float16).fill_(6e4)
        again = torch.empty_like(block)
        again.fill_(2.0)
    places = [r.place for r in recorder.ranges()]
    assert places and not any("empty" in p for p in places)


def test_hooks_are_taken_away() -> None:
    model = Model(1.0)
    with RangeRecorder({"inner": model.inner}) as recorder:
        model(torch.ones(1, 4, dtype=torch.float16))
    recorder.ranges()
    assert not model.inner._forward_hooks and not model.inner._forward_pre_hooks
