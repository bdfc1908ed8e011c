"""Running a plan on the user's data to see what its linears get: after compression, the method's selection in the loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tmc_export.api.calibration_data import Sample
from tmc_export.api.eager import running_kind, running_rows
from tmc_export.core.errors import RecipeError, RuntimeInputError
from tmc_export.quantize.histogram import Histogram
from tmc_export.quantize.row_sample import RowSample
from tmc_export.runtime.session import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Seen", "observe", "observed"]


@dataclass
class Seen:
    """What linears got.

    Attributes:
        inputs: name of a linear's weight → its input; linears that read one input have one entry, the same object.
        rows: the same, some of its rows; empty unless asked for.
        products: name → `[K, K]` float32, its input's channels times each other, summed over the rows; of those asked for.
        blocks: name → `[K / block, block, block]` float32, the same of the channels of each block alone.
    """

    inputs: dict[str, Histogram] = field(default_factory=dict)
    rows: dict[str, RowSample] = field(default_factory=dict)
    products: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)

    def groups(self) -> list[tuple[str, ...]]:
        """Names that read one input, together, in the order in which they ran."""
        found: dict[int, list[str]] = {}
        for name, histogram in self.inputs.items():
            found.setdefault(id(histogram), []).append(name)
        return [tuple(names) for names in found.values()]


def observe(
    session: Session,
    samples: Sequence[Sample],
    wanted: Mapping[str, nn.Linear],
    progress: Callable[[str], None] = lambda _: None,
    divisors: Mapping[str, Array] | None = None,
    rows: int = 0,
    products: Collection[str] = (),
    blocks: Mapping[str, int] = MappingProxyType({}),
) -> Seen:
    """Answer every sample and remember what the linears got.

    Args:
        session: on the eager backend.
        samples: what to answer; one token each, so that the prompt's rows are those that count.
        wanted: name → linear.
        progress: called with one line per sample.
        divisors: name → `[K]`, which a linear's input is divided by before it is looked at.
        rows: of every input that are kept.
        products: names of the linears whose input's channels are multiplied with each other.
        blocks: name → input channels of a block, of the linears that `Seen.blocks` are wanted of.

    Returns:
        What the inputs were. Rows of padding do not count, nor what a compress graph runs besides: its products are not quantized. A
        linear that did not run has no entry.

    Raises:
        RecipeError: a sample does not fit the bundle, or an input is not finite; names the sample.
    """
    found = Seen()
    with observed(wanted, found, divisors or {}, rows, products, blocks):
        for number, sample in enumerate(samples, 1):
            progress(f"calibrate {number}/{len(samples)}")
            try:
                session.generate([str(p) for p in sample.images], sample.prompt, chat=session.template is not None, max_new_tokens=1)
            except (RuntimeInputError, ValueError) as error:
                raise RecipeError(f"{sample.place}: {error}") from error
    return found


@contextmanager
def observed(
    wanted: Mapping[str, nn.Linear],
    found: Seen,
    divisors: Mapping[str, Array],
    keep: int = 0,
    products: Collection[str] = (),
    blocks: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[None]:
    """While active, add the inputs of linears to `found`."""
    last: list[tuple[Tensor, str]] = []  # the input that was looked at last, held so that no other tensor takes its place in memory

    def look(name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        if running_kind() in ("compress", "tower"):
            return
        rows: Tensor = given[0]
        if last and last[0][0] is rows:
            leader = last[0][1]
            found.inputs.setdefault(name, found.inputs[leader])
            if keep:
                found.rows.setdefault(name, found.rows[leader])
            if name in blocks:
                found.blocks.setdefault(name, found.blocks[leader])
            return
        last[:] = [(rows, name)]
        valid = running_rows()
        if valid is not None and rows.shape[:2] == valid.shape:
            rows = rows[valid]
        flat = rows.reshape(-1, rows.shape[-1]).float().numpy()
        if name in divisors:
            flat = flat / divisors[name]
        try:
            found.inputs.setdefault(name, Histogram(flat.shape[1])).add(flat)
        except ValueError as error:
            raise ValueError(f"the input of '{name}': {error}") from error
        if keep:
            found.rows.setdefault(name, RowSample(keep, flat.shape[1])).add(flat)
        if name in products:
            piece = torch.from_numpy(flat)
            found.products.setdefault(name, torch.zeros(flat.shape[1], flat.shape[1])).addmm_(piece.T, piece)
        if name in blocks:
            parts = torch.from_numpy(flat).reshape(len(flat), -1, blocks[name]).permute(1, 2, 0)
            found.blocks.setdefault(name, torch.zeros(len(parts), blocks[name], blocks[name])).baddbmm_(parts, parts.transpose(1, 2))

    handles = [linear.register_forward_pre_hook(lambda m, given, n=name: look(n, m, given)) for name, linear in wanted.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
