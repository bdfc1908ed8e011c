"""Entropic optimal transport by Sinkhorn's iterations, unrolled.

Legend: b batch, n sources, m targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SMALLEST_EPSILON", "sinkhorn"]

SMALLEST_EPSILON = 0.05
"""Below it `exp(-cost / epsilon)` of costs of about 2 leaves the range of float32, and the plan would need logarithms."""


def sinkhorn(cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the plan `[b, n, m]` after a fixed number of iterations; the columns are met exactly, the rows as far as it got.

    `K = exp(-cost / epsilon)`, `u = 1`, `v = columns / (K^T u)`; then `iterations` times `u = rows / (K v)`, `v = columns / (K^T u)`; the
    plan is `diag(u) K diag(v)`. A row or column of mass 0 (padding) takes no part. A cost that depends on the row alone cancels in the
    first iteration; without iterations every column shares its mass out by `exp(-cost / epsilon)` and rows are not looked at.

    Args:
        cost: `[b, n, m]`, from 0 to a few; float32.
        rows: `[b, n]` mass of the sources.
        columns: `[b, m]` mass of the targets, with the same sum.
        epsilon: weight of the entropy, at least `SMALLEST_EPSILON`.
        iterations: at least 0.

    Raises:
        ValueError: epsilon or iterations too small.

    >>> import torch
    >>> half = torch.full((1, 2), 0.5)
    >>> [[round(x, 3) for x in row] for row in sinkhorn(torch.eye(2).unsqueeze(0), half, half, 1.0, 5)[0].tolist()]
    [[0.134, 0.366], [0.366, 0.134]]
    """
    if epsilon < SMALLEST_EPSILON or iterations < 0:
        raise ValueError(f"epsilon: {epsilon}, iterations: {iterations}; use at least {SMALLEST_EPSILON} and at least 0")
    kernel = (cost.float() / -epsilon).exp()
    rows, columns = rows.unsqueeze(2), columns.unsqueeze(2)
    u = (rows > 0).float()
    v = columns / (kernel.transpose(1, 2) @ u).clamp_min(1e-30)
    for _ in range(iterations):
        u = rows / (kernel @ v).clamp_min(1e-30)
        v = columns / (kernel.transpose(1, 2) @ u).clamp_min(1e-30)
    return u * kernel * v.transpose(1, 2)
