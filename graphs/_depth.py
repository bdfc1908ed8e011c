"""Which encoder layers a method cuts at."""

from __future__ import annotations

from collections.abc import Sequence

from tmc_export.graphs._contract import Site

__all__ = ["layers_of"]


def layers_of(at: Site, layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return the layers of an entry: the one of `at`, the listed ones, or those at a quarter, a half and three quarters of the depth.

    Raises:
        ValueError: the list is empty, does not rise, or names a layer that the encoder lacks.

    >>> layers_of(Site.parse("encoder"), None, 12)
    (3, 6, 9)
    """
    quarters = sorted({depth * i // 4 for i in (1, 2, 3)} - {0})
    found = (at.layer,) if at.layer is not None else tuple(quarters) if layers is None else tuple(layers)
    if not found or list(found) != sorted(set(found)) or not all(0 <= layer < depth for layer in found):
        raise ValueError(f"layers: {list(found)} are not ascending layers of the {depth} of the encoder; use 0 to {depth - 1}")
    return found
