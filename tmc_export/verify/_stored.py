"""The reference of a checkpoint that is quantized already: Hugging Face's own modules, with the weights that the codes stand for.

transformers would load such a checkpoint through the package that made it, and multiply with that package's kernels. Here its linears are
ordinary ones, whose weights `export.packed` makes of the codes: the one place that does so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tmc_export.core.errors import ModelError
from tmc_export.export.checkpoint import open_checkpoint
from tmc_export.export.packed import scheme_of
from tmc_export.export.skeleton import make_skeleton

__all__ = ["load_stored"]


def load_stored(folder: Path, dtype: torch.dtype) -> Any | None:
    """Load the model with its weights in memory; None where the checkpoint is not quantized.

    Raises:
        ModelError: a file is missing or damaged, or says something that is not read.
    """
    if scheme_of(folder) is None:
        return None
    from transformers import AutoConfig, GenerationConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = make_skeleton(config, dtype, "eager")
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: transformers cannot read its configuration: {' '.join(str(error).split())}") from error
    checkpoint = open_checkpoint(folder, model)
    read: dict[str, torch.Tensor] = {}
    for name in checkpoint.shapes:
        key = checkpoint.identity(name)
        read.setdefault(key, checkpoint.read(name, dtype))
    model.load_state_dict({name: read[checkpoint.identity(name)] for name in checkpoint.shapes}, strict=True, assign=True)
    model.tie_weights()
    return model
