"""Inputs of fp8 codes in a reduced model: polygraphy, which shall show the fault, feeds no such type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tmc_export.core.lazy import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["with_codes_inside"]


def with_codes_inside(model: Any, feed: Mapping[str, Array]) -> tuple[Any, dict[str, Array]]:
    """Return the model with what is fed as fp8 codes as constants, and the rest of the feed.

    Args:
        model: `onnx.ModelProto`, changed in place.
        feed: its inputs; codes are bytes.
    """
    onnx = require("onnx", extra="export", purpose="write the reduced model")
    rest, fp8 = dict(feed), onnx.TensorProto.FLOAT8E4M3FN
    for value in [v for v in model.graph.input if v.name in feed and v.type.tensor_type.elem_type == fp8]:
        codes = rest.pop(value.name)
        model.graph.input.remove(value)
        model.graph.initializer.append(onnx.helper.make_tensor(value.name, fp8, codes.shape, codes.tobytes(), raw=True))
    return model, rest
