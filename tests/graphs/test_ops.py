"""The shared mathematics: ties, padding, large n, and the decomposition against torch's."""

from __future__ import annotations

import pytest
import torch

from tests.graphs._onnx import execute, export
from tmc_export.graphs import _ops
from tmc_export.graphs._raster import line_matrix
from tmc_export.graphs._spectrum import singular_row_sums


def _by_sorting(scores: torch.Tensor, k: int, valid: torch.Tensor) -> list[list[int]]:
    """Plain Python: the valid by falling score, then index; then the padding by index."""
    rows = []
    for row, ok in zip(scores.tolist(), valid.tolist(), strict=True):
        rows.append(sorted(range(len(row)), key=lambda i: (not ok[i], -row[i] if ok[i] else 0.0, i))[:k])
    return rows


@pytest.mark.parametrize(("n", "k", "levels"), [(40, 7, 3), (40, 40, 3), (577, 200, 9), (33, 1, 1), (64, 63, 2)])
def test_selection_equals_plain_sorting(n: int, k: int, levels: int) -> None:
    draw = torch.Generator().manual_seed(n + k)
    scores = torch.randint(0, levels, (3, n), generator=draw).float()
    scores[0, ::5] = float("-inf")
    valid = torch.rand(3, n, generator=draw) < 0.6
    want = _by_sorting(scores, k, valid)
    assert _ops.top_in_order(scores, k, valid).tolist() == want
    kept, others = _ops.keep_top(scores, k, valid)
    assert kept.tolist() == [sorted(row) for row in want]
    assert [sorted(a + b) for a, b in zip(kept.tolist(), others.tolist(), strict=True)] == [list(range(n))] * 3


def test_a_tie_to_another_index_would_be_found() -> None:
    scores, valid = torch.zeros(1, 9), torch.ones(1, 9, dtype=torch.bool)
    assert _by_sorting(scores.flip(1), 3, valid) == [[0, 1, 2]] != (8 - torch.arange(3)).tolist()
    assert torch.equal(_ops.keep_top(scores, 3, valid)[0], torch.tensor([[0, 1, 2]]))


@pytest.mark.parametrize("k", [10, 4000, 4990])
def test_counts_around_the_largest_topk(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold from above, from below and by rank give one answer, and no graph holds a TopK that TensorRT refuses."""
    scores = torch.randint(0, 50, (1, 5000), generator=torch.Generator().manual_seed(0)).float()
    want = [sorted(row) for row in _by_sorting(scores, k, torch.ones(1, 5000, dtype=torch.bool))]
    assert _ops.keep_top(scores, k)[0].tolist() == want
    monkeypatch.setattr(_ops, "LARGEST_TOPK", 5)
    assert _ops.keep_top(scores, k)[0].tolist() == want


def test_onnxruntime_breaks_ties_alike() -> None:
    scores = torch.randint(0, 4, (2, 90), generator=torch.Generator().manual_seed(1)).float()

    def run(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept, others = _ops.keep_top(given["scores"], 30)
        return {"kept": kept, "others": others, "order": _ops.top_in_order(given["scores"], 30)}

    got = execute(export(run, {"scores": scores}), {"scores": scores})  # type: ignore[arg-type]
    want = run({"scores": scores})
    assert {name: value.tolist() for name, value in got.items()} == {name: value.tolist() for name, value in want.items()}


def test_scatter_sum_drops_what_points_nowhere() -> None:
    values, index = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[1, -1, 1]])
    assert _ops.scatter_sum(values, index, 2).tolist() == [[[0.0], [5.0]]]
    assert _ops.complement(torch.tensor([[3, 1]]), 5).tolist() == [[0, 2, 4]]
    assert _ops.normalize(torch.zeros(1, 1, 3)).tolist() == [[[0.0, 0.0, 0.0]]]


@pytest.mark.parametrize(("old", "new"), [(24, 12), (27, 9), (14, 5), (336, 100)])
def test_resampling_equals_torch(old: int, new: int) -> None:
    x = torch.randn(1, 1, old, 8, generator=torch.Generator().manual_seed(0))
    for kind, options in (("bilinear", {}), ("antialias", {"antialias": True})):
        want = torch.nn.functional.interpolate(x, (new, 8), mode="bilinear", align_corners=False, **options)[0, 0]
        got = line_matrix(old, new, kind) @ x[0, 0]  # type: ignore[arg-type]
        assert torch.allclose(got, want, atol=3e-6), kind  # weights of size 1 in float32, positions up to 336


def _tokens(kind: str, n: int, c: int) -> torch.Tensor:
    x = torch.randn(n, c, generator=torch.Generator().manual_seed(n))
    if kind == "outlier":
        x[:, 3] += 100 * torch.rand(n, generator=torch.Generator().manual_seed(1))
        x[5] *= 50
    if kind == "unit":
        x = x / x.norm(dim=1, keepdim=True)
    if kind == "padded":
        x[n // 2 :] = 0
    return x


@pytest.mark.parametrize("kind", ["plain", "outlier", "unit", "padded"])
def test_row_sums_of_the_decomposition(kind: str) -> None:
    x = _tokens(kind, 100, 160)
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)
    want = (u * s).abs().sum(dim=1)
    got = singular_row_sums(x.unsqueeze(0))[0].double()
    assert float((got - want).abs().max() / want.max()) < 1e-5  # float32; measured 1e-6
    fewer = singular_row_sums(x.unsqueeze(0), steps=2, polish=0)[0].double()
    assert float((fewer - want).abs().max() / want.max()) > 1e-4, "two turns cannot have converged"
