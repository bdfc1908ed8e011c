"""Looking at the queries that a decoder layer's own eager attention gets, which Hugging Face hands out nowhere.

Legend: h heads, T tokens, d channels of a head.
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
def queries_of(attention: Any, found: list[Tensor]) -> Iterator[None]:
    """While active, put the scaled, rotated queries `[h, T, d]` of every eager attention of this module's file into `found`.

    The computation stays the model's own: its function is called through, and put back at the end.

    Raises:
        ExportError: the module's file has no eager attention of its own.
    """
    file: Any = sys.modules[type(attention).__module__]
    original = getattr(file, _NAME, None)
    if original is None:
        raise ExportError(f"{file.__name__} has no {_NAME}; the reference cannot look at the queries of {type(attention).__name__}")

    def looked_at(module: Any, query: Tensor, *rest: Any, scaling: float, **options: Any) -> Any:
        found.append((query * scaling)[0])
        return original(module, query, *rest, scaling=scaling, **options)

    setattr(file, _NAME, looked_at)
    try:
        yield
    finally:
        setattr(file, _NAME, original)
