"""Row sums of |U S| of a singular value decomposition, out of matrix products alone.

ONNX has no decomposition, and a textbook Jacobi sweep is n steps that do little each. Here every plane is turned at once: with `A = V^T G V` (G the Gram
matrix), all Jacobi angles `theta_ij = atan(2 A_ij / (A_jj - A_ii)) / 2` form one skew matrix, scaled so that its spectral norm stays below 3 (bounded by
`||theta^2||_F^(1/2)`), and V is multiplied by a fourth-order exponential of it and made orthogonal again by one Newton-Schulz step. Once the angles are small this
converges quadratically. The last steps take `A = Y Y^T` from `Y = V^T X` instead of the Gram matrix, which is accurate for small singular values too.

*Measured on one core in PyTorch (40 + 3 steps), against float64:* n=576, c=4096: relative error of a row sum 2e-6 (random tokens 7e-6), 1.5 s; the float32
`torch.linalg.svd` has 9e-6 (2e-5) and takes 0.65 s. n=144, c=192: 1e-6, 0.03 s. With fewer than 35 steps n=576 has not converged (1e-3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["singular_row_sums"]

_NOISE = 1e-7
_REACH = 3.0


def singular_row_sums(x: Tensor, steps: int = 40, polish: int = 3) -> Tensor:
    """Return `sum_j |U S|_ij` `[b, n]` float32 for `x = U S V^T` `[b, n, c]`, n <= c.

    Args:
        x: rows; zero rows are allowed and get 0.
        steps: turns on the Gram matrix; 40 converge up to about n=600.
        polish: turns on the rows themselves.

    >>> import torch
    >>> x = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]]])
    >>> [round(v, 3) for v in singular_row_sums(x)[0].tolist()]
    [3.0, 2.0]
    """
    import torch

    x = x.float()
    largest = (x * x).sum(dim=2).amax(dim=1).sqrt().clamp_min(1e-30)[:, None, None]
    x = x / largest
    gram = x @ x.transpose(1, 2)
    eye = torch.eye(x.shape[1])
    v = eye.expand_as(gram)
    for _ in range(steps):
        a = v.transpose(1, 2) @ (gram @ v)
        diagonal = (a * eye).sum(dim=2)
        v = _turn(a, v, eye, diagonal, (_NOISE * diagonal.amax(dim=1))[:, None, None])
        v = _orthogonal(v)
    for _ in range(polish):
        y = v.transpose(1, 2) @ x
        a = y @ y.transpose(1, 2)
        diagonal = (a * eye).sum(dim=2)
        length = diagonal.clamp_min(0.0).sqrt()
        v = _turn(a, v, eye, diagonal, _NOISE * length.unsqueeze(2) * length.unsqueeze(1))
        v = _orthogonal(_orthogonal(v))
    y = v.transpose(1, 2) @ x
    singular = (y * y).sum(dim=2).sqrt().unsqueeze(1)
    return (v * singular).abs().sum(dim=2) * largest.squeeze(2)


def _turn(a: Tensor, v: Tensor, eye: Tensor, diagonal: Tensor, noise: Tensor) -> Tensor:
    """Turn the basis `v` by all Jacobi angles of `a` at once; entries at or below `noise` stay."""
    import torch

    n = a.shape[1]
    index = torch.arange(n)
    sign = torch.where(index.unsqueeze(0) > index.unsqueeze(1), 1e-30, -1e-30)
    gap = diagonal.unsqueeze(1) - diagonal.unsqueeze(2)
    gap = torch.where(gap == 0, sign, gap)
    off = a * (1.0 - eye)
    off = torch.where(off.abs() > noise, off, torch.zeros_like(off))
    angle = 0.5 * torch.atan(2.0 * off / gap)
    angle = 0.5 * (angle - angle.transpose(1, 2))
    square = angle @ angle
    norm = (square * square).sum(dim=(1, 2), keepdim=True).sqrt().sqrt()
    scale = (_REACH / norm.clamp_min(1e-20)).clamp_max(1.0)
    angle, square = angle * scale, square * (scale * scale)
    return v @ (eye + angle + square @ (0.5 * eye + angle / 6.0 + square / 24.0))


def _orthogonal(v: Tensor) -> Tensor:
    """One Newton-Schulz step towards the nearest orthogonal matrix."""
    return 1.5 * v - 0.5 * (v @ (v.transpose(1, 2) @ v))
