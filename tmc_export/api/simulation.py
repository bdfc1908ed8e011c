"""A plan's subgraphs in PyTorch with its weight schemes acted out: some of the weights rounded as the graphs hold them, the rest float32.

What a graph does to a product `x W` is done to the linear that it was traced from: W is rounded by the schemes' own functions
(`quantize/rounded.py`), x is divided by calibration's divisors and rounded to its codes. Arithmetic is float32. Compress graphs and text
towers read the checkpoint's weights, as in a bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tmc_export.api._slot_codes import slot_codes
from tmc_export.api.eager import EagerBackend, running_kind
from tmc_export.api.eager_program import EagerProgram, weight_budget
from tmc_export.bundle.program import SlotCodes
from tmc_export.core.errors import RecipeError
from tmc_export.export.checkpoint import TensorSource
from tmc_export.export.materialize import WeightCache
from tmc_export.plan.types import Plan, QuantizePlan
from tmc_export.quantize._fp4_inputs import rounded_by_nvfp4
from tmc_export.quantize._inputs import TOPS, input_scale
from tmc_export.quantize._weights import is_kept
from tmc_export.quantize.calibrated import Calibrated
from tmc_export.quantize.nvfp4 import global_scale
from tmc_export.quantize.rounded import READS, rounded_weight, shared_scale
from tmc_export.surgery.replay import rounded_slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["SLOTS", "Simulation", "Target"]

SLOTS = "kv"
"""Stands for the codes in the KV slots, among the names of weights."""


@dataclass(frozen=True)
class Target:
    """A weight that the plan's schemes round.

    Attributes:
        name: in the checkpoint.
        part: whose scheme it has.
        scheme: the scheme.
        files: subgraphs in which it is rounded.
        product: whether a matrix product reads it, whose input may be divided and rounded, too.
        together: names of the part's rounded weights that read the same input, its own included.
    """

    name: str
    part: str
    scheme: QuantizePlan
    files: frozenset[str]
    product: bool
    together: tuple[str, ...]


class Simulation:
    """The schemes of a plan on an eager program.

    Args:
        plan: its schemes.
        eager: its subgraphs, unquantized.
        found: what calibration found.

    Attributes:
        targets: what is rounded in a bundle, by name, in the order in which graphs read it. The slots, where they hold codes, are `SLOTS`.
        backend: runs the subgraphs; as in float32 until `rounding` says otherwise.
        weights: what it reads weights with, per file.

    Raises:
        RecipeError: calibration did not reach a linear whose input has codes, or a graph's matrix is no weight of the checkpoint.
    """

    def __init__(self, plan: Plan, eager: EagerProgram, found: Calibrated) -> None:
        self._eager, self._found = eager, found
        self._dtype: Any = np.float16 if plan.dtype == "float16" else np.float32
        self._active: frozenset[str] = frozenset()
        self._slots: SlotCodes | None = slot_codes(plan, found.slots or None)
        self.targets: Mapping[str, Target] = _targets(plan, eager)
        self._check()
        self._shared: dict[tuple[str, ...], Array] = {}
        rounded = {file: frozenset(t.name for t in self.targets.values() if file in t.files) for file in eager.weights}
        budget = weight_budget(len({(id(cache), rounded[file]) for file, (_, cache) in eager.weights.items() if rounded[file]}))
        caches: dict[tuple[int, frozenset[str]], WeightCache] = {}
        self.weights: dict[str, tuple[Mapping[int, str], WeightCache]] = {}
        for file, (names, cache) in eager.weights.items():
            mine = rounded[file]
            key = id(cache), mine
            if mine and key not in caches:
                caches[key] = WeightCache(_Rounded(cache, eager.identity, partial(self._round, mine)), torch.float32, budget)
            self.weights[file] = names, caches[key] if mine else cache
        self.backend = EagerBackend(eager.backend.runnables, self.weights)

    @property
    def slots(self) -> bool:
        """Whether the slots hold codes."""
        return self._slots is not None

    @property
    def active(self) -> frozenset[str]:
        """What is rounded now."""
        return self._active

    @contextmanager
    def rounding(self, names: Collection[str]) -> Iterator[None]:
        """While active, the weights named (and the slots, by `SLOTS`) are rounded, and the inputs of their products.

        Raises:
            ValueError: a name that the plan's schemes do not round.
        """
        unknown = sorted(set(names) - self.targets.keys() - ({SLOTS} if self.slots else set()))
        if unknown:
            raise ValueError(f"'{unknown[0]}' is not rounded by this plan; {len(self.targets)} weights are")
        before, self._active = self._active, frozenset(names)
        with ExitStack() as stack:
            stack.callback(setattr, self, "_active", before)
            for name in names:
                if name != SLOTS and self.targets[name].product and name in self._eager.linears:
                    handle = self._eager.linears[name].register_forward_pre_hook(self._hook(self.targets[name]))
                    stack.callback(handle.remove)
            if SLOTS in names and self._slots is not None:
                stack.enter_context(rounded_slots(_rounder(self._slots)))
            yield

    def _check(self) -> None:
        """Refuse what a build would refuse, and what cannot be rounded here: nothing is left out in silence."""
        used = [names for file, (names, _) in self._eager.weights.items() if self._eager.reads.get(file)]
        known = {self._eager.identity(name) for names in used for name in names.values()}
        for target in self.targets.values():
            if target.name not in known:
                raise RecipeError(
                    f"quantize.{target.part}: a graph multiplies with '{target.name}', made of a weight when it is traced; what its "
                    f"rounding does is not measured yet; measure a copy of the recipe without quantize.{target.part}"
                )
            product = target.product and target.name in self._eager.linears  # the input of a patch embedding stays
            needs_clip = target.scheme.activations is not None and product and target.name not in self._found.clips
            if needs_clip or (target.scheme.algorithm != "rtn" and target.name not in self._found.codes):
                raise RecipeError(
                    f"quantize.calibration: no sample reached '{target.name}', so that its codes are not known; give samples that use it "
                    "(with pictures, or longer), or name it in keep"
                )

    def _round(self, mine: frozenset[str], name: str) -> Callable[[Tensor], Tensor] | None:
        """How a weight is rounded now, in a graph that rounds `mine`; None: not at all."""
        if name not in self._active or name not in mine:
            return None
        target = self.targets[name]

        def change(weight: Tensor) -> Tensor:
            shared = self._scale(target, weight) if target.scheme.weights == "nvfp4" else None
            source = weight.numpy().astype(self._dtype)
            divisor, chosen = self._found.divisors.get(name), self._found.codes.get(name)
            return torch.from_numpy(rounded_weight(name, source, target.scheme, divisor=divisor, chosen=chosen, shared=shared))

        return change

    def _scale(self, target: Target, weight: Tensor) -> Array:
        if target.together not in self._shared:
            linears = [self._eager.weight(n) if n in self._eager.linears else weight for n in target.together]
            self._shared[target.together] = shared_scale(target.together, [w.numpy().astype(self._dtype) for w in linears])
        return self._shared[target.together]

    def _hook(self, target: Target) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor, ...] | None]:
        divisor, codes = self._found.divisors.get(target.name), target.scheme.activations
        factor = None if divisor is None else torch.from_numpy((1 / divisor.astype(np.float64)).astype(np.float32))
        clip = self._found.clips.get(target.name)
        step = None if codes is None or clip is None else _step(clip, codes, self._dtype)

        def change(_: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
            if running_kind() in ("compress", "tower") or target.name not in self._active:
                return None
            rows: Tensor = given[0] if factor is None else given[0] * factor
            return (rows if step is None or codes is None else _codes(rows, step, codes), *given[1:])

        return change


def _step(clip: float, codes: str, dtype: Any) -> float:
    return float(global_scale(clip, dtype) if codes == "nvfp4" else input_scale(clip, TOPS[codes], dtype))


def _codes(rows: Tensor, step: float | Tensor, scheme: str) -> Tensor:
    """What the graph's rounding of a product's input, or of new rows of the slots, gives; `step` is the scale."""
    if scheme == "int8":
        return (rows / step).round().clamp(-128, 127) * step
    if scheme == "nvfp4":
        return torch.from_numpy(rounded_by_nvfp4(rows.float().numpy(), float(step)))
    top = TOPS[scheme]
    return (rows / step).clamp(-top, top).to(torch.float8_e4m3fn).float() * step


def _rounder(codes: SlotCodes) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    scales = {name: torch.tensor(each)[None, :, None, None] for name, each in codes.scales.items()}

    def change(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return _codes(key, scales[f"{layer}.key"], codes.dtype), _codes(value, scales[f"{layer}.value"], codes.dtype)

    return change


def _targets(plan: Plan, eager: EagerProgram) -> dict[str, Target]:
    """What the graphs of a build would round; see `PartSchemes.apply`."""
    files: dict[str, set[str]] = {}
    parts: dict[str, str] = {}
    products: set[str] = set()
    groups: dict[tuple[str, str, int], list[str]] = {}
    for file, reads in eager.reads.items():
        for read in reads:
            scheme = plan.quantize.get(read.part)
            skip = scheme is None or scheme.stored is not None or is_kept(read.name, scheme.keep)
            if skip or scheme is None or read.operator not in READS[scheme.weights]:
                continue
            files.setdefault(read.name, set()).add(file)
            parts[read.name] = read.part
            if read.operator == "MatMul":
                products.add(read.name)
                groups.setdefault((file, read.part, read.source), []).append(read.name)
    together = {name: tuple(dict.fromkeys(names)) for names in groups.values() for name in names}
    return {
        name: Target(name, part, plan.quantize[part], frozenset(files[name]), name in products, together.get(name, (name,)))
        for name, part in parts.items()
    }


class _Rounded(TensorSource):
    """A cache's tensors, some of them rounded."""

    def __init__(self, cache: WeightCache, identity: Callable[[str], str], how: Callable[[str], Callable[[Tensor], Tensor] | None]) -> None:
        self._cache, self._identity, self._how = cache, identity, how

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def identity(self, name: str) -> str:
        stored = self._identity(name)
        return stored if self._how(stored) is None else f"{stored}|rounded"

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        weight, change = self._cache.read(name), self._how(self._identity(name))
        return (weight if change is None else change(weight)).to(dtype)
