"""A CLIP checkpoint's text side without its weights, and the source that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmc_export.core.errors import ModelError
from tmc_export.export.checkpoint import Checkpoint, open_checkpoint
from tmc_export.export.skeleton import parameters_on_meta

__all__ = ["TowerSource", "open_tower"]


@dataclass(frozen=True)
class TowerSource:
    """The weights of a tower; see `TensorSource`. Its names are told apart from the model's and from other towers'.

    Attributes:
        index: number of the tower.
        checkpoint: its weights.
    """

    index: int
    checkpoint: Checkpoint

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape."""
        return self.checkpoint.shapes

    def identity(self, name: str) -> str:
        """Say which bytes a tensor has."""
        return f"text tower {self.index}: {self.checkpoint.identity(name)}"

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read one tensor."""
        return self.checkpoint.read(name, dtype)


def open_tower(folder: Path, index: int, dtype: torch.dtype) -> tuple[nn.Module, TowerSource]:
    """Make a `CLIPTextModelWithProjection` with parameters on the meta device, and find its weights.

    Args:
        folder: a CLIP checkpoint, of the whole model or of its text side.
        index: number of the tower.
        dtype: of the parameters.

    Raises:
        ModelError: the configuration or the weights are missing, damaged, or do not belong together.
    """
    from transformers import AutoConfig, CLIPTextModelWithProjection

    try:
        whole: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config: Any = getattr(whole, "text_config", whole)
        config.projection_dim = whole.projection_dim
        config._attn_implementation = "eager"
        with parameters_on_meta(), torch.no_grad():
            model: Any = CLIPTextModelWithProjection(config)
            model.to(dtype)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: transformers cannot make a text tower of this config.json: {' '.join(str(error).split())}") from error
    model.eval()
    checkpoint = open_checkpoint(folder, model)
    if checkpoint.packed:
        raise ModelError(f"{folder}: the text tower's weights are stored as codes, which is not read; name the unquantized tower")
    return model, TowerSource(index, checkpoint)
