"""torch.onnx's table of translations, read once in a process.

`torch.onnx.export` makes the table anew for every graph: it finds the source of several hundred functions of onnxscript and parses their
signatures. The table depends on the opset alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["shared_translations"]


@functools.cache
def _shared(registry: Any) -> Callable[..., Any]:
    """What reads the table, asked once for each opset."""
    return functools.cache(registry.from_torchlib)


@contextlib.contextmanager
def shared_translations() -> Iterator[None]:
    """Let `torch.onnx.export` take the table that an earlier call in this process has read.

    Only for calls without a `custom_translation_table`, which is written into the table. With a torch that keeps it elsewhere nothing is
    shared, and every call reads its own.
    """
    try:
        from torch.onnx._internal.exporter import _registration

        registry: Any = _registration.ONNXRegistry
        own = vars(registry)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    shared = _shared(registry)
    registry.from_torchlib = staticmethod(shared)
    try:
        yield
    finally:
        registry.from_torchlib = own
