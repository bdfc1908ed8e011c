"""Row sums of |U S| of a singular value decomposition, out of matrix products alone.

ONNX has no decomposition, and a textbook Jacobi sweep is n steps that do little each. Here every plane is turned at once. With
`A = V^T G V` (G the Gram matrix of the rows), all Jacobi angles `theta_ij = atan(2 A_ij / (A_jj - A_ii)) / 2` form one skew matrix,
scaled so that its spectral norm stays below 3 (bounded by `||theta^2||_F^(1/2)`); V is multiplied by its fourth-order exponential and
brought back to orthogonal by a Newton-Schulz step. Once the angles are small this converges quadratically. Two things keep it accurate
where tokens share large directions, as those of a language model do: a reflection first sets the leading direction aside, and every few
turns the rows themselves are multiplied out and G is formed anew, so that no small singular value is read off a large matrix.

*Measured on one core in PyTorch against float64 (largest error of a row sum, relative to the largest):* n=576, c=4096: 5e-6, 2 s (float32
`torch.linalg.svd`: 1e-5, 0.65 s); the same with an outlier channel or token of 100 to 300 times the rest: 1e-6 (5e-5); n=144: 1e-6, 0.03 s.
Without the reflection an outlier channel does not converge (0.1). 1,460 nodes and 8 s of export at n=100,
1,900 nodes and 22 s at n=576, where onnxruntime takes 1.2 s on one core.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["singular_row_sums", "turns_for"]

_NOISE = 1e-7
_ROUND = 6
_POWER = 8
_REACH = 3.0


def turns_for(n: int) -> int:
    """Return how many turns on the Gram matrix `n` rows need, with a margin: 24 for 64, 28 for 144, 40 for 576."""
    return 16 + math.ceil(math.sqrt(n))


def singular_row_sums(x: Tensor, steps: int | None = None, polish: int = 3) -> Tensor:
    """Return `sum_j |U S|_ij` `[b, n]` float32 for `x = U S V^T` `[b, n, c]`, n <= c.

    Args:
        x: rows; zero rows are allowed and get 0.
        steps: turns on the Gram matrix; `turns_for(n)` when left out.
        polish: turns on the rows themselves.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
    >>> [round(v, 3) for v in singular_row_sums(x)[0].tolist()]
    [3.0, 2.0]
    """
    x = x.float()
    largest = (x * x).sum(dim=2).amax(dim=1).sqrt().clamp_min(1e-30)[:, None, None]
    x = x / largest
    n = x.shape[1]
    left = turns_for(n) if steps is None else steps
    v = _leading_first(x)
    y = v.transpose(1, 2) @ x
    while left > 0:
        turns = min(left, _ROUND)
        v = _orthogonal(v @ _diagonalize(y, turns))
        y = v.transpose(1, 2) @ x
        left -= turns
    for _ in range(polish):
        v = _orthogonal(_orthogonal(v @ _diagonalize(y, 1)))
        y = v.transpose(1, 2) @ x
    singular = (y * y).sum(dim=2).sqrt().unsqueeze(1)
    return (v * singular).abs().sum(dim=2) * largest.squeeze(2)


def _leading_first(x: Tensor) -> Tensor:
    """Return the reflection `[b, n, n]` that maps the first axis to the leading left singular direction, by power iteration."""
    import torch

    gram = x @ x.transpose(1, 2)
    u = gram.sum(dim=2, keepdim=True) + 0.5 * gram[:, :, :1]
    for _ in range(_POWER):
        u = gram @ u
        u = u / (u * u).sum(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
    eye = torch.eye(x.shape[1])
    mirror = u + torch.where(u[:, :1] >= 0, 1.0, -1.0) * eye[:, :1]
    return eye - (2.0 / (mirror * mirror).sum(dim=1, keepdim=True)) * (mirror @ mirror.transpose(1, 2))


def _diagonalize(y: Tensor, turns: int) -> Tensor:
    """Return the basis `[b, n, n]` after some turns on the Gram matrix of the rows `y` `[b, n, c]`."""
    import torch

    gram = y @ y.transpose(1, 2)
    length = (y * y).sum(dim=2, keepdim=True).sqrt()
    noise = _NOISE * length * length.transpose(1, 2)
    half = 0.5 * torch.eye(y.shape[1])
    v = _orthogonal(_turn(gram, None, half, noise))
    for _ in range(turns - 1):
        v = _orthogonal(_turn(v.transpose(1, 2) @ (gram @ v), v, half, noise))
    return v


def _turn(a: Tensor, v: Tensor | None, half: Tensor, noise: Tensor) -> Tensor:
    """Turn the basis `v` (None: the identity) by all Jacobi angles of `a` at once; entries at or below `noise` stay.

    The diagonal of `a` needs no mask: its angle is subtracted from itself. Equal diagonal entries turn by a quarter of pi, in one
    direction.
    """
    import torch

    index = torch.arange(a.shape[1])
    sign = torch.where(index.unsqueeze(0) > index.unsqueeze(1), 1e-30, -1e-30)
    diagonal = a * half
    gap = diagonal.sum(dim=1, keepdim=True) - diagonal.sum(dim=2, keepdim=True) + sign
    off = torch.where(a.abs() > noise, a, 0.0)
    angle = torch.atan(off / gap)
    angle = 0.25 * (angle - angle.transpose(1, 2))
    square = angle @ angle
    scale = (_REACH * (square * square).sum(dim=(1, 2), keepdim=True).clamp_min(1e-30).pow(-0.25)).clamp_max(1.0)
    angle, square = angle * scale, square * (scale * scale)
    turn = angle + square @ (half + angle / 6.0 + square / 24.0)
    return 2.0 * half + turn if v is None else v + v @ turn


def _orthogonal(v: Tensor) -> Tensor:
    """One Newton-Schulz step towards the nearest orthogonal matrix."""
    import torch

    return v @ (1.5 * torch.eye(v.shape[1]) - 0.5 * (v.transpose(1, 2) @ v))
