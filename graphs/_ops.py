"""The mathematics the methods share: selection with ties to the lowest index, merging, gathering, cosine similarity.

Everything here is exact and the same in PyTorch, onnxruntime and TensorRT, because no result rests on how a backend breaks ties:
`torch.topk` keeps other members than the ONNX TopK on ties, `argsort(stable=True)` has no ONNX form, and TensorRT takes neither a scatter
with a reduction nor a TopK above 3840. So ranks come from comparisons, kept sets from a threshold, and sums from a one-hot matrix product.
The one exception is `argmax`, which PyTorch and ONNX define as the first on ties and TensorRT does not say. Scores are float32,
whatever the tokens are.

*Measured on one core in onnxruntime, batch 1:* `keep_top` 0.02 ms at n=576 and 0.06 ms at n=4096; `rank` (n x n comparisons) 0.15 ms at
n=576, 11 ms at n=4096. So the threshold form is what a method uses for a *set*; `rank` is for a method whose definition needs the *order*.

Legend: b batch, n candidates, k kept, c channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LARGEST_TOPK",
    "argmax",
    "chosen",
    "complement",
    "cosine",
    "gather",
    "keep_top",
    "normalize",
    "one_hot",
    "order_by",
    "partition",
    "rank",
    "scatter_sum",
    "scores_of",
    "top_in_order",
]

LARGEST_TOPK = 3840
"""The largest k of a TopK that TensorRT builds."""

_LOWEST_VALID = -1.0e38
_INVALID = -3.0e38


def scores_of(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Return finite float32 scores in which every invalid candidate is below every valid one; `[b, n]`, any dtype, to `[b, n]`.

    A valid `-inf` becomes -1e38 and an invalid candidate -3e38, so that neither arithmetic nor fp32 ranges are left.
    """
    import torch

    finite = scores.float().clamp(_LOWEST_VALID, -_LOWEST_VALID)
    if valid is None:
        return finite
    return torch.where(valid, finite, torch.full_like(finite, _INVALID))


def rank(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the place `[b, n]` (int64) of every candidate when sorted by falling score, ties to the lowest index, invalid ones last.

    `rank_i = #(s_j > s_i) + #(s_j = s_i and j < i)`: a permutation of 0 … n-1.

    >>> import torch
    >>> rank(torch.tensor([[1.0, 3.0, 3.0, 2.0]])).tolist()
    [[3, 0, 1, 2]]
    """
    import torch

    s = scores_of(scores, valid)
    index = torch.arange(s.shape[1], device=s.device)
    mine, other = s.unsqueeze(2), s.unsqueeze(1)
    earlier = index.unsqueeze(0) < index.unsqueeze(1)
    before = (other > mine) | ((other == mine) & earlier)
    return before.float().sum(dim=2).long()


def order_by(place: Tensor) -> Tensor:
    """Invert permutations: the candidate `[b, n]` that stands at each place, for places `[b, n]` that are a permutation of 0 … n-1.

    >>> import torch
    >>> order_by(torch.tensor([[3, 0, 1, 2]])).tolist()
    [[1, 2, 3, 0]]
    """
    import torch

    index = torch.arange(place.shape[1], device=place.device).unsqueeze(0).expand(place.shape[0], -1)
    return torch.zeros_like(place).scatter(1, place, index)


def top_in_order(scores: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Return the `k` best candidates `[b, k]` (int64) by falling score; ties to the lowest index, invalid ones last.

    >>> import torch
    >>> top_in_order(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3).tolist()
    [[1, 2, 3]]
    """
    return order_by(rank(scores, valid))[:, :k]


def partition(chosen: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Split candidates by a mask `[b, n]` that is true exactly `k` times a row: (chosen `[b, k]`, the others `[b, n-k]`), both ascending.

    >>> import torch
    >>> [t.tolist() for t in partition(torch.tensor([[True, False, True, False]]), 2)]
    [[[0, 2]], [[1, 3]]]
    """
    import torch

    index = torch.arange(chosen.shape[1], device=chosen.device).unsqueeze(0)
    up_to = chosen.long().cumsum(dim=1)
    order = order_by(torch.where(chosen, up_to - 1, k + index - up_to))
    return order[:, :k], order[:, k:]


def chosen(scores: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Return the mask `[b, n]` of the `k` best candidates; equal scores go to the lowest index, invalid candidates come last.

    The mask of `keep_top`, for a method that needs no indices.
    """
    import torch

    n = scores.shape[1]
    s = scores_of(scores, valid)
    if k >= n:
        return torch.ones_like(s, dtype=torch.bool)
    if k <= LARGEST_TOPK:
        threshold = torch.topk(s, k, dim=1).values[:, k - 1 :]
    elif n - k + 1 <= LARGEST_TOPK:
        threshold = torch.topk(s, n - k + 1, dim=1, largest=False).values[:, n - k :]
    else:
        return rank(scores, valid) < k
    above, level = s > threshold, s == threshold
    room = k - above.long().sum(dim=1, keepdim=True)
    return above | (level & (level.long().cumsum(dim=1) <= room))


def keep_top(scores: Tensor, k: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the `k` best candidates and the others, both in ascending order: `[b, k]` and `[b, n-k]`, int64.

    Equal scores go to the lowest index and invalid candidates come last. The k-th value is a threshold: all above it stay, and of
    those equal to it the first ones that fit, so the result is exact whichever tied members a backend's TopK names.

    >>> import torch
    >>> [t.tolist() for t in keep_top(torch.tensor([[2.0, 3.0, 2.0, 2.0]]), 2)]
    [[[0, 1]], [[2, 3]]]
    """
    return partition(chosen(scores, k, valid), k)


def complement(kept: Tensor, n: int) -> Tensor:
    """Return the candidates `[b, n-k]` of 0 … n-1 that are not in `kept` `[b, k]` (distinct), ascending."""
    return partition(~one_hot(kept, n).amax(dim=1).bool(), n - kept.shape[1])[0]


def argmax(scores: Tensor) -> Tensor:
    """Return the first largest entry of the last axis (int64); PyTorch and ONNX both document "first" on ties."""
    return scores.argmax(dim=-1)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Return rows `[b, k, ...]` of `values` `[b, n, ...]` at `index` `[b, k]` (0 … n-1), as one Gather of whole rows.

    >>> import torch
    >>> gather(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[1], [0]])).tolist()
    [[[2.0]], [[3.0]]]
    """
    import torch

    b, n = values.shape[0], values.shape[1]
    first = torch.arange(b, device=index.device).unsqueeze(1) * n
    rows = values.flatten(0, 1).index_select(0, (index + first).flatten())
    return rows.reshape(b, index.shape[1], *values.shape[2:])


def one_hot(index: Tensor, n: int) -> Tensor:
    """Return `[b, k, n]` float32, 1 where `index` `[b, k]` points; a row of an index outside 0 … n-1 (such as -1) is all zero."""
    import torch

    return (index.unsqueeze(2) == torch.arange(n, device=index.device)).float()


def scatter_sum(values: Tensor, index: Tensor, k: int) -> Tensor:
    """Add rows `[b, n, c]` into `k` rows: `[b, k, c]` float32, row `index[b, i]` takes `values[b, i]`; -1 is dropped.

    A one-hot matrix product, because TensorRT takes no scatter with a reduction. A mean is `scatter_sum(x) / scatter_sum(ones)`.
    """
    return one_hot(index, k).transpose(1, 2) @ values.float()


def normalize(x: Tensor, eps: float = 0.0) -> Tensor:
    """Return `x / max(|x|, eps)` along the last axis, in float32; with `eps=0` a zero vector stays zero.

    ToMe and VisionZip divide by the bare norm (a zero vector would be NaN there); `torch.nn.functional.normalize` has eps 1e-12.
    """
    x = x.float()
    return x / (x * x).sum(dim=-1, keepdim=True).sqrt().clamp_min(max(eps, 1e-30))


def cosine(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Return the cosines `[..., n, m]` of every row of `a` `[..., n, c]` with every row of `b` `[..., m, c]`, in float32."""
    return normalize(a, eps) @ normalize(b, eps).transpose(-1, -2)
