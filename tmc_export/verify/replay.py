"""Playing a bundle's recorded conversations through a backend and keeping what comes out. No torch, no checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmc_export import __version__
from tmc_export.core.errors import BundleError, RuntimeInputError
from tmc_export.runtime.session import load
from tmc_export.verify.play import Player
from tmc_export.verify.recorded import read_cases
from tmc_export.verify.saved import ROUTES, Saved, identity_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["replay"]


def replay(
    bundle: Path,
    *,
    backend: str = "onnxruntime",
    threads: int | None = None,
    routes: Sequence[str] = ROUTES,
    progress: Callable[[str], None] = lambda _: None,
) -> Saved:
    """Play every recorded conversation along the recorded answers, prefilled whole where it fits and, a second time, in chunks.

    Args:
        bundle: the folder.
        backend: see `runtime.load`; int4 weights are multiplied as on a device (accuracy level 1).
        threads: CPU threads.
        routes: see `saved.ROUTES`.
        progress: called with the name of each conversation before it is played.

    Raises:
        RuntimeInputError: the bundle holds no recorded conversations, or the backend does not exist.
        BundleError: files are missing or damaged, or a graph lacks an output.
    """
    session = load(bundle, backend=backend, threads=threads, int4_accuracy=1)
    cases = list(read_cases(bundle))
    if not cases:
        raise RuntimeInputError(f"{bundle} holds no recorded conversations to play; build it without --no-record")
    arrays: dict[str, NDArray[Any]] = {}
    for route in ROUTES:
        for case in cases if route in routes else ():
            progress(f"{case.name}, {'in chunks' if route == 'chunked' else 'whole'}")
            player = Player(session, "chunked" if route == "chunked" else "auto")
            for number, turn in enumerate(case.turns):
                try:
                    found = player.turn(turn)
                except KeyError as error:
                    raise BundleError(f"{bundle}: a graph lacks the output {error}; build the bundle again") from error
                arrays |= {f"{route}.{case.name}.{number}.{name}": array for name, array in found.items()}
    conversations, graphs = identity_of(session.manifest)
    made_by = f"tmc-export {__version__}, {backend}, {platform.machine()} {platform.system()}"
    products = "float32" if backend == "onnxruntime" else "tf32"  # see on_device
    return Saved(conversations, graphs, tuple(r for r in ROUTES if r in routes), made_by, arrays, products)
