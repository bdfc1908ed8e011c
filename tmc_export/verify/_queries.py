"""Looking at the queries and keys that a decoder layer's own eager attention gets, which Hugging Face hands out nowhere.

Legend: h heads, g KV heads, T tokens, s keys, d channels of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tmc_export.core.errors import ExportError

__all__ = ["queries_of"]

_NAME = "eager_attention_forward"


@contextmanager
def queries_of(attention: Any, found: list[Tensor], keys: list[Tensor] | None = None) -> Iterator[None]:
    """While active, put the scaled, rotated queries `[h, T, d]` of every eager attention of this module's file into `found`.

    With `keys`, the keys that they meet go there too: `[g, s, d]`, past ones included.

    The computation stays the model's own: its function is called through, and put back at the end.

    Raises:
        ExportError: the module's file has no eager attention of its own.
    """
    file: Any = sys.modules[type(attention).__module__]
    original = getattr(file, _NAME, None)
    if original is None:
        raise ExportError(f"{file.__name__} has no {_NAME}; the reference cannot look at the queries of {type(attention).__name__}")

    def looked_at(module: Any, query: Tensor, key: Tensor, *rest: Any, scaling: float, **options: Any) -> Any:
        found.append((query * scaling)[0])
        if keys is not None:
            keys.append(key[0])
        return original(module, query, key, *rest, scaling=scaling, **options)

    setattr(file, _NAME, looked_at)
    try:
        yield
    finally:
        setattr(file, _NAME, original)
