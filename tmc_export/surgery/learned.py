"""Learned weights of methods as parameters of the subgraph that runs them, on the meta device like the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tmc_export.plan.types import LearnedWeights, StagePlan

__all__ = ["Learned"]


class Learned(nn.Module):
    """What the stages of one subgraph have learned, by recipe entry.

    A parameter is called after the entry and the method's name for it, with `/` for the dots that torch keeps for submodules.

    Args:
        stages: of the subgraph; the stages of one entry share their weights.
        dtype: of the parameters.
    """

    def __init__(self, stages: Sequence[StagePlan], dtype: torch.dtype) -> None:
        super().__init__()
        self._weights = {s.entry: s.weights for s in stages if s.weights is not None}
        for entry, weights in self._weights.items():
            held = nn.Module()
            for name, shape in weights.shapes.items():
                empty = torch.empty(shape, dtype=dtype, device="meta")
                held.register_parameter(_local(name), nn.Parameter(empty, requires_grad=False))
            self.add_module(str(entry), held)

    def of(self, stage: StagePlan) -> dict[str, Tensor]:
        """The weights of a stage's entry, under the method's names."""
        if stage.weights is None:
            return {}
        held = self.get_submodule(str(stage.entry))
        return {name: held.get_parameter(_local(name)) for name in stage.weights.shapes}

    def sources(self) -> Iterator[tuple[str, LearnedWeights, str]]:
        """Yield every parameter's name in this module, where it comes from, and the method's name for it."""
        for entry, weights in self._weights.items():
            for name in weights.shapes:
                yield f"{entry}.{_local(name)}", weights, name


def _local(name: str) -> str:
    return name.replace(".", "/")
