"""What the verify tests share as types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tmc_export.plan.types import Plan

__all__ = ["Planner", "Prompt", "Prompter"]


@dataclass(frozen=True)
class Prompt:
    """One turn's inputs; `pixels` [3, H, W] each."""

    pixels: tuple[NDArray[np.float32], ...]
    input_ids: NDArray[np.int64]
    group: NDArray[np.int64]


Planner = Callable[..., Plan]
Prompter = Callable[..., Prompt]
