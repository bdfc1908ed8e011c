"""Does a model's arithmetic stay inside float16? onnxruntime's CPU path computes float16 graphs in float32, so it cannot say; PyTorch can.

The model runs in PyTorch's half precision, and every float16 tensor that any operator makes is looked at, through a dispatch mode, so
nothing is missed except what PyTorch itself fuses into one operator. What the model or a method computes in float32 on purpose (the squares
of a norm, a softmax, scores) has float32's range on a device too, and is not looked at. Hugging Face scales attention's products after the
multiplication, the exported graph its queries before: there the figure is the larger one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tmc_export.verify.tolerances import FLOAT16_MAX

__all__ = ["Range", "RangeRecorder"]

_MASK = (-3.5e4, -2.5e4)
"""Scores in here carry the mask of -3e4 that the reference and the graphs add in half precision; they are no activations."""


@dataclass(frozen=True)
class Range:
    """The largest magnitude of one operator in one module.

    Attributes:
        place: module path and operator, `"language_model.layers.3.mlp: aten.mul"`.
        largest: max |x|; infinite when a value left float16.
    """

    place: str
    largest: float

    @property
    def overflows(self) -> bool:
        """Above the largest float16."""
        return self.largest > FLOAT16_MAX

    @property
    def near(self) -> bool:
        """Above half of it."""
        return self.largest > FLOAT16_MAX / 2


class RangeRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records max |x| of float16 tensors per module and operator while active. Masks do not count.

    Args:
        modules: the model's modules by name, whose entry and exit say where an operator runs.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where: list[str] = [""]
        self._found: dict[str, float] = {}
        self._hooks = []
        for name, module in modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._enter(name)))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: Any) -> None:
            self._where.append(name)

        return hook

    def _leave(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        self._where.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and look at its floating outputs."""
        out = func(*args, **(kwargs or {}))
        if "empty" in str(func):  # memory as it was found: nothing has been computed yet
            return out
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float16 and tensor.numel():
                self._see(f"{self._where[-1]}: {func}", tensor)
        return out

    def _see(self, place: str, tensor: torch.Tensor) -> None:
        values = tensor.detach().float()
        masked = (values > _MASK[0]) & (values < _MASK[1])
        sizes = torch.where(masked, 0.0, values.abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
        self._found[place] = max(self._found.get(place, 0.0), float(sizes.max()))

    def ranges(self) -> Sequence[Range]:
        """Return what was seen, largest first (of equal ones, the one that came first), and take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        return sorted((Range(k, v) for k, v in self._found.items()), key=lambda r: -r.largest)
