"""The reference's own reading of learned weights: straight from the file, or from the generator, once per conversation model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tmc_export.core.errors import ModelError
from tmc_export.export.random_weights import random_weight
from tmc_export.plan.types import LearnedWeights, StagePlan

__all__ = ["MethodWeights"]


class MethodWeights:
    """Learned weights by recipe entry, kept after the first look.

    Args:
        dtype: that the reference computes in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._held: dict[tuple[Path | None, str, int | None, str, tuple[int, ...]], Tensor] = {}

    def of(self, stage: StagePlan) -> dict[str, Tensor]:
        """Return a stage's weights under the method's names.

        Raises:
            ModelError: the file is damaged, or not where the plan found it.
        """
        weights = stage.weights
        if weights is None:
            return {}
        keys = {name: (weights.path, weights.prefix, weights.random, name, shape) for name, shape in weights.shapes.items()}
        if any(key not in self._held for key in keys.values()):
            for name, tensor in self._read(weights).items():
                self._held[keys[name]] = tensor.to(self.dtype)
        return {name: self._held[key] for name, key in keys.items()}

    def _read(self, weights: LearnedWeights) -> dict[str, Tensor]:
        if weights.random is not None:
            return {name: torch.from_numpy(random_weight(weights.random, name, shape)) for name, shape in weights.shapes.items()}
        from safetensors import SafetensorError, safe_open

        if weights.path is None:
            raise ModelError(f"the plan does not say where '{weights.file}' lies; make it from the recipe again")
        try:
            with safe_open(weights.path, framework="pt") as file:
                return {name: file.get_tensor(weights.prefix + name) for name in weights.shapes}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read the learned weights of {weights.path}: {error}; fetch the file again") from error
