"""Running a plan on the user's data to see what its linears get: after compression, the method's selection in the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tmc_export.api.calibration_data import Sample
from tmc_export.api.eager import running_rows
from tmc_export.core.errors import RecipeError, RuntimeInputError
from tmc_export.quantize.histogram import Histogram
from tmc_export.runtime.session import Session

__all__ = ["observe", "observed"]


def observe(
    session: Session, samples: Sequence[Sample], wanted: Mapping[str, nn.Linear], progress: Callable[[str], None] = lambda _: None
) -> dict[str, Histogram]:
    """Answer every sample and remember what the linears got.

    Args:
        session: on the eager backend.
        samples: what to answer; one token each, so that the prompt's rows are those that count.
        wanted: name → linear.
        progress: called with one line per sample.

    Returns:
        Name → what its input was; rows of padding do not count. A linear that did not run has no entry.

    Raises:
        RecipeError: a sample does not fit the bundle, or an input is not finite; names the sample.
    """
    found: dict[str, Histogram] = {}
    with observed(wanted, found):
        for number, sample in enumerate(samples, 1):
            progress(f"calibrate {number}/{len(samples)}")
            try:
                session.generate([str(p) for p in sample.images], sample.prompt, chat=session.template is not None, max_new_tokens=1)
            except (RuntimeInputError, ValueError) as error:
                raise RecipeError(f"{sample.place}: {error}") from error
    return found


@contextmanager
def observed(wanted: Mapping[str, nn.Linear], found: dict[str, Histogram]) -> Iterator[None]:
    """While active, add the inputs of linears to `found`."""

    def look(name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        rows: Tensor = given[0]
        valid = running_rows()
        if valid is not None and rows.shape[:2] == valid.shape:
            rows = rows[valid]
        flat = rows.reshape(-1, rows.shape[-1]).float().numpy()
        try:
            found.setdefault(name, Histogram(flat.shape[1])).add(flat)
        except ValueError as error:
            raise ValueError(f"the input of '{name}': {error}") from error

    handles = [linear.register_forward_pre_hook(lambda m, given, n=name: look(n, m, given)) for name, linear in wanted.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
