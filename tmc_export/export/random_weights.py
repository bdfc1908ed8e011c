"""Random weights for a learned method whose checkpoint is not at hand: the one place that says what they are.

They make shapes, memory, times and parity provable; answers computed with them mean nothing. The numbers depend on seed, name and shape
alone: they are made of Philox's raw bits and one division, so that they are the same on every machine and for every version of numpy.

Rule, by the shape and the last part of the name:

- two axes or more: uniform with variance 1 / fan-in, the fan-in being what one output sums over (all axes but the first, leading axes of
  length 1 left out), so that activations neither grow nor vanish;
- one axis or none: `bias`, `beta` and `running_mean` are zeros; `weight`, `gamma`, `scale` and `running_var` are ones, for a norm at 0.02
  would silence what follows it; anything else (a class token, a query) is uniform with variance 1 / length, a number by itself is 1.
"""

from __future__ import annotations

import hashlib
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["random_weight"]

_ZEROS = ("bias", "beta", "running_mean")
_ONES = ("weight", "gamma", "scale", "running_var")


def random_weight(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the weight of that seed, name and shape.

    >>> random_weight(0, "norm.weight", (3,)).tolist(), random_weight(0, "norm.bias", (2,)).tolist()
    ([1.0, 1.0, 1.0], [0.0, 0.0])
    >>> abs(float(random_weight(0, "up.weight", (64, 256)).std()) - 1 / 16) < 1e-3
    True
    """
    if len(shape) < 2:
        last = name.rpartition(".")[2]
        if last in _ZEROS:
            return np.zeros(shape, np.float32)
        if last in _ONES or not shape:
            return np.ones(shape, np.float32)
        return _uniform(seed, name, shape, shape[0])
    inner = list(shape)
    while len(inner) > 2 and inner[0] == 1:
        del inner[0]
    return _uniform(seed, name, shape, prod(inner[1:]))


def _uniform(seed: int, name: str, shape: tuple[int, ...], fan_in: int) -> NDArray[np.float32]:
    """Whole numbers of 24 bits, brought to ±√(3 / fan-in): all exact but the last product."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    raw = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(max(prod(shape), 1))[: prod(shape)]
    centred = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0 - 2.0**-24)
    return (centred * np.float32(np.sqrt(3.0 / max(fan_in, 1)))).reshape(shape)
