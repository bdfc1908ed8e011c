"""What keys and values are like on the user's data, per layer and KV head: where the scales of slots of codes come from.

The blocks' own outputs `present.<l>.key` and `.value` are looked at, rotated as the slots get them, rows of padding left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tmc_export.api.eager import Runnable, running_rows
from tmc_export.quantize._inputs import TOPS
from tmc_export.quantize.clipping import Observer, clip_of
from tmc_export.quantize.histogram import Histogram

if TYPE_CHECKING:
    from tmc_export.api.eager import EagerBackend

__all__ = ["SlotsSeen", "observed_slots", "slot_scales"]

SlotsSeen = dict[str, tuple[Histogram, ...]]
"""`<layer>.key` and `<layer>.value` → what was seen, per KV head."""

_NEW = "present."


@contextmanager
def observed_slots(backend: EagerBackend, found: SlotsSeen) -> Iterator[None]:
    """While active, add the keys and values that a backend's blocks make to `found`.

    Args:
        backend: runs the blocks; see `eager_program`.
        found: gets an entry for every layer that runs.

    Raises:
        ValueError: where a block runs: a key or value is not finite.
    """
    blocks = {id(r.module): r for r in backend.runnables.values() if any(name.startswith(_NEW) for name in r.outputs)}
    handles = [r.module.register_forward_hook(_looker(r, found)) for r in blocks.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _looker(block: Runnable, found: SlotsSeen) -> Any:
    places = [(index, name.removeprefix(_NEW)) for index, name in enumerate(block.outputs) if name.startswith(_NEW)]

    def look(module: nn.Module, given: Any, made: tuple[Tensor, ...]) -> None:
        valid = running_rows()
        for index, name in places:
            heads = made[index].transpose(0, 1)  # [g, b, T, d]
            rows = heads.flatten(1, 2) if valid is None else heads[:, valid]
            seen = found.setdefault(name, tuple(Histogram(heads.shape[-1]) for _ in heads))
            for head, (histogram, values) in enumerate(zip(seen, rows, strict=True)):
                try:
                    histogram.add(values.float().numpy())
                except ValueError as error:
                    raise ValueError(f"head {head} of the KV tensor '{name}': {error}") from error

    return look


def slot_scales(
    seen: Mapping[str, Sequence[Histogram]], observer: Observer = "minmax", share: float = 99.99, codes: str = "int8"
) -> dict[str, tuple[float, ...]]:
    """Return the scale of every head: the end of its range, divided by the largest code.

    Args:
        seen: what `observed_slots` found.
        observer: how the end is chosen; see `clip_of`.
        share: per cent of the magnitudes that `percentile` keeps inside.
        codes: `int8`, or `fp8`, which goes with the observers that reckon with no equal steps.

    Returns:
        `<layer>.key` and `<layer>.value` → a scale per KV head, above 0: a head of which only zeros were seen has the range 1.

    >>> import numpy as np
    >>> head = Histogram(2)
    >>> head.add(np.array([[1.0, -254.0]], np.float32))
    >>> slot_scales({"0.key": (head,)})
    {'0.key': (2.0,)}
    """
    top = TOPS[codes]
    return {
        name: tuple((clip_of(observer, head, share=share, levels=int(top)) or 1.0) / top for head in heads) for name, heads in seen.items()
    }
