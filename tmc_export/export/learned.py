"""The learned weights of a method as a source of tensors beside the checkpoint: a safetensors file, or the generator's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tmc_export.export.checkpoint import narrow, read_raw, wrong_shape
from tmc_export.export.random_weights import random_weight

__all__ = ["LearnedSource"]


@dataclass(frozen=True)
class LearnedSource:
    """See `TensorSource`.

    Attributes:
        shapes: the method's name of a tensor → its shape.
        path: the file; None when the weights are random.
        prefix: of the names in the file.
        seed: of random weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    path: Path | None = None
    prefix: str = ""
    seed: int = 0

    def identity(self, name: str) -> str:
        """Say which bytes a tensor has: file and key, or what the generator makes it of."""
        if self.path is not None:
            return f"{self.path}:{self.prefix}{name}"
        return f"random {self.seed}:{name}:{list(self.shapes[name])}"

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read one tensor.

        Raises:
            ModelError: the file is damaged, the shape differs, or a value overflows `dtype`.
        """
        shape = self.shapes[name]
        if self.path is None:
            return torch.from_numpy(random_weight(self.seed, name, shape)).to(dtype)
        tensor = read_raw(self.path, self.prefix + name)
        if tuple(tensor.shape) != shape:
            raise wrong_shape(self.path, self.prefix + name, tuple(tensor.shape), shape)
        return narrow(tensor, name, dtype)
