"""The range recorder sees every operator's output, and neither masks nor memory that holds nothing yet."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tmc_export.verify.half import RangeRecorder  # noqa: E402


class Model(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.inner.weight.data = factor * torch.eye(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.inner(x)
        masked = torch.where(torch.arange(4) < 2, scores, torch.full_like(scores, -3e38))
        return (masked + torch.where(torch.arange(4) < 2, 0.0, float("-inf"))).softmax(-1)


@pytest.mark.parametrize(("factor", "near", "overflows"), [(1.0, False, False), (5e4, True, False), (7e4, True, True)])
def test_what_is_computed_inside_is_seen(factor: float, near: bool, overflows: bool) -> None:
    model = Model(factor)
    with torch.no_grad(), RangeRecorder({"inner": model.inner}) as recorder:
        out = model(torch.ones(1, 4))
    assert float(out.max()) == 0.5, "the output says nothing of what was inside"
    largest = recorder.ranges()[0]
    assert (largest.largest, largest.near, largest.overflows) == (factor, near, overflows)
    assert any(r.place.startswith("inner: ") and r.largest == factor for r in recorder.ranges())


def test_memory_that_holds_nothing_yet_is_not_looked_at() -> None:
    with RangeRecorder({}) as recorder:
        block = torch.empty(1 << 16).fill_(1e30)
        again = torch.empty_like(block)
        again.fill_(2.0)
    places = [r.place for r in recorder.ranges()]
    assert places and not any("empty" in p for p in places)


def test_hooks_are_taken_away() -> None:
    model = Model(1.0)
    with RangeRecorder({"inner": model.inner}) as recorder:
        model(torch.ones(1, 4))
    recorder.ranges()
    assert not model.inner._forward_hooks and not model.inner._forward_pre_hooks
