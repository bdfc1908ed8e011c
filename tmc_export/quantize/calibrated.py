"""What calibration found, by the name of each weight in the checkpoint; empty where a recipe needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Calibrated"]


@dataclass(frozen=True)
class Calibrated:
    """What a plan's linears got on the user's data.

    Attributes:
        clips: weight → the magnitude of its input that the largest code stands for.
        divisors: weight → float32 `[K]`, above 0: its input channels are divided by them and its rows multiplied. Weights that read one
            input have one array.
        codes: weight → int4 codes `[K, N]` (int8, in [-8, 7]) and their scales `[K / block, N]`, where AWQ or GPTQ chose them.
        slots: `<layer>.key` and `<layer>.value` → the scale of each KV head's codes, where slots hold codes.
        digest: of the data; "" without any.
        samples: questions answered.
    """

    clips: Mapping[str, float] = field(default_factory=dict)
    divisors: Mapping[str, Array] = field(default_factory=dict)
    codes: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    slots: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    digest: str = ""
    samples: int = 0
