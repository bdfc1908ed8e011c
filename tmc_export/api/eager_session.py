"""The runtime's session on a plan's subgraphs in PyTorch: it answers as `run` does, and can be listened to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tmc_export.api.eager_program import EagerProgram
from tmc_export.api.sidecars import copy_sidecars
from tmc_export.bundle.manifest import Manifest
from tmc_export.plan.types import Plan
from tmc_export.runtime._backend import Backend, BackendOptions
from tmc_export.runtime._decoder import Route, TurnTrace
from tmc_export.runtime.session import Prompt, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["EagerSession", "eager_session"]


class EagerSession(Session):
    """A session that keeps what its last turn was and gave.

    Attributes:
        laid, trace: of the last turn.
        reuse: the next turns' encoded prompt, where it is known: no vision graph runs then.
    """

    laid: Prompt | None = None
    trace: TurnTrace | None = None
    reuse: Prompt | None = None

    def prompt(self, ids: Sequence[int], pixels: Sequence[tuple[int, Array]], questions: Sequence[str] = ()) -> Prompt:
        """As `Session.prompt`, or `reuse`."""
        return self.reuse if self.reuse is not None else super().prompt(ids, pixels, questions)

    def run_prompt(self, prompt: Prompt, route: Route = "auto") -> TurnTrace:
        """As `Session.run_prompt`; remembers."""
        self.laid, self.trace = prompt, super().run_prompt(prompt, route)
        return self.trace


@contextmanager
def eager_session(
    plan: Plan, eager: EagerProgram, folder: Path, towers: Mapping[str, Path], backend: Backend | None = None
) -> Iterator[EagerSession]:
    """Open a session on eager subgraphs.

    Args:
        plan: what they are of.
        eager: the subgraphs.
        folder: the model folder.
        towers: folders of the text towers, by source.
        backend: runs them; the program's own when None.
    """
    with TemporaryDirectory(prefix="tmc-export-eager-") as place:
        copy_sidecars(folder, Path(place) / "model")
        for tower, program in zip(plan.towers, eager.program.towers, strict=True):
            copy_sidecars(towers[tower.source], Path(place) / program.folder)
        manifest = Manifest(name=plan.name, key="", recipe={}, plan={}, checkpoint={}, versions={}, program=eager.program)
        yield EagerSession(Path(place), manifest, backend or eager.backend, BackendOptions())
