"""Weights while a module runs: a model on the meta device computes, and one submodule's tensors at a time are in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tmc_export.export.checkpoint import TensorSource

__all__ = ["WeightCache", "materialized"]


class WeightCache:
    """Tensors of a source, the last used ones kept.

    Args:
        source: where they are read.
        dtype: of floating tensors.
        budget: bytes that may stay.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype, budget: int) -> None:
        self._source, self._dtype, self._budget = source, dtype, budget
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def read(self, name: str) -> Tensor:
        """Return a tensor; it stays if it fits."""
        key = self._source.identity(name)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tensor = self._source.read(name, self._dtype)
        self._kept[key] = tensor
        self._bytes += tensor.nbytes
        while self._bytes > self._budget and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= gone.nbytes
        return tensor


@contextmanager
def materialized(module: nn.Module, names: Mapping[int, str], cache: WeightCache) -> Iterator[None]:
    """While active, every submodule has its weights while it runs, and lies on the meta device otherwise.

    Convolutions have theirs while the whole module runs: a patch embedding's kernel is read as a matrix, the convolution itself never runs.

    Args:
        module: what will run.
        names: identity (`id`) of a parameter → its name in the cache's source; others must be real.
        cache: where weights come from.
    """
    handles: list[Any] = []

    def fill(part: nn.Module, own: Mapping[str, nn.Parameter]) -> None:
        for local, parameter in own.items():
            part._parameters[local] = nn.Parameter(cache.read(names[id(parameter)]), requires_grad=False)

    def empty(part: nn.Module, own: Mapping[str, nn.Parameter]) -> None:
        part._parameters.update(own)

    for part in module.modules():
        own = {n: p for n, p in part._parameters.items() if p is not None and p.is_meta and id(p) in names}
        if own:
            runs = module if isinstance(part, (nn.Conv2d, nn.Conv3d)) else part
            handles.append(runs.register_forward_pre_hook(lambda _, __, part=part, own=own: fill(part, own)))
            handles.append(runs.register_forward_hook(lambda _, __, ___, part=part, own=own: empty(part, own), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
