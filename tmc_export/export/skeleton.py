"""A Hugging Face model without its weights: parameters on the meta device, computed buffers real.

Making `LlavaForConditionalGeneration` for 7 billion weights this way takes seconds and no memory to speak of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tmc_export.core.errors import ModelError

__all__ = ["make_skeleton", "parameters_on_meta"]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While it lasts, every parameter that a module registers goes to the meta device; buffers stay real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def make_skeleton(config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    """Make the model of a transformers configuration without its weights, in eval mode.

    Args:
        config: a transformers configuration.
        dtype: dtype of the parameters.
        attention: name of the attention implementation of the decoder; the encoder keeps transformers' own.

    Raises:
        ModelError: transformers cannot make a model of this configuration.
    """
    from transformers import AutoModelForImageTextToText

    make: Any = AutoModelForImageTextToText
    try:
        with parameters_on_meta(), torch.no_grad():
            model: Any = make.from_config(config, dtype=dtype, attn_implementation="eager")
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(f"transformers cannot make a model of this configuration: {error}") from error
    model.eval()
    model.tie_weights()
    for module in model.modules():
        own = getattr(module, "config", None)
        if hasattr(module, "layer_idx") and own is not None:
            own._attn_implementation = attention
    result: nn.Module = model
    return result
