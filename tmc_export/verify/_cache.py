"""The reference's cache: keys and values per layer as tensors that grow, stored as they are or as a bundle's slots would give them back.

Legend: T new tokens, g KV heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tmc_export.bundle.program import SlotCodes
from tmc_export.core.errors import ExportError

__all__ = ["Cache"]


class Cache:
    """Keys and values per layer, and the place in the conversation of every row. Layers call `update` as they call transformers' caches.

    Args:
        layers: of the decoder.
        codes: slots of codes: every row is rounded to them as it comes, so that the layer that made it sees it so, too. None: rows are
            kept as they are.
    """

    def __init__(self, layers: int, codes: SlotCodes | None = None) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.orders = [torch.zeros(0, dtype=torch.int64) for _ in range(layers)]
        self.storing = True
        self._scales = {} if codes is None else {name: torch.tensor(s)[None, :, None, None] for name, s in codes.scales.items()}
        self._codes = None if codes is None else codes.dtype

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Append `[1, g, T, d]` and return all rows; nothing is stored inside `peeking`."""
        key, value = self._rounded(key, f"{layer}.key"), self._rounded(value, f"{layer}.value")
        old_key, old_value = self.keys[layer], self.values[layer]
        if old_key is not None and old_value is not None:
            key, value = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        if self.storing:
            self.keys[layer], self.values[layer] = key, value
        return key, value

    def _rounded(self, rows: Tensor, name: str) -> Tensor:
        if self._codes is None:
            return rows
        scaled = rows.float() / self._scales[name]
        if self._codes == "fp8":
            codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        else:
            codes = scaled.round().clamp(-128, 127)
        return (codes * self._scales[name]).to(rows.dtype)

    @contextmanager
    def peeking(self) -> Iterator[None]:
        """Let a layer see the cache without leaving anything in it."""
        self.storing = False
        try:
            yield
        finally:
            self.storing = True

    def prune(self, layer: int, gone: Tensor) -> None:
        """Take the rows whose places are in `gone` out of a layer."""
        keep = ~torch.isin(self.orders[layer], gone)
        key, value = self.keys[layer], self.values[layer]
        if key is None or value is None:
            raise ExportError(f"KV rows of decoder layer {layer} are to be pruned before that layer has run; only earlier layers can be")
        self.keys[layer], self.values[layer] = key[:, :, keep], value[:, :, keep]
        self.orders[layer] = self.orders[layer][keep]
