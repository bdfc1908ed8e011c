"""Codes out of the words that checkpoints store them in, as arrays in one form: codes `[K, N]`, scales and zero points `[G, N]`.

Legend: K input channels, N output channels, G groups of input channels that share a scale, n codes in a word (8 of 4 bits, 4 of 8).

| format | codes | zero points | scales |
|---|---|---|---|
| GPTQ | `qweight [K / n, N]`, words along K | `qzeros [G, N / n]`, less one in its first format | `scales [G, N]` |
| AWQ | `qweight [K, N / 8]`, words along N in the order 0 2 4 6 1 3 5 7 | `qzeros [G, N / 8]`, the same order | `scales [G, N]` |
| compressed-tensors | `weight_packed [N, K / n]`, words along K | `weight_zero_point [N / n, G]`, words along N | `weight_scale [N, G]` |

A word is 32 bits, its first code in the lowest ones. Codes are unsigned there; compressed-tensors' are signed ones with half of their range
added. Sources: `AutoGPTQ/auto_gptq/nn_modules/qlinear/qlinear_cuda.py`, `AutoAWQ/awq/utils/packing_utils.py`,
`compressed-tensors/src/compressed_tensors/compressors/pack_quantized/helpers.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["AWQ_ORDER", "unpack_awq", "unpack_words"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of eight, whose code lies in a word's lowest four bits, in the next four, and so on."""


def unpack_words(words: Array, bits: int, axis: int) -> Array:
    """Return the unsigned codes of 32-bit words, in order along an axis.

    Args:
        words: int32, two axes.
        bits: of a code: 4 or 8.
        axis: which axis a word's codes lie along.

    Returns:
        uint8, that axis `32 / bits` times as long.

    >>> unpack_words(np.array([[0x76543210]], np.int32), 4, 1).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    >>> unpack_words(np.array([[-256]], np.int32), 8, 0).tolist()
    [[0], [255], [255], [255]]
    """
    plain = np.ascontiguousarray(words).view(np.uint32)
    parts = [((plain >> np.uint32(shift)) & np.uint32(2**bits - 1)).astype(np.uint8) for shift in range(0, 32, bits)]
    shape = list(words.shape)
    shape[axis] *= len(parts)
    return np.stack(parts, axis=axis + 1).reshape(shape)


def unpack_awq(words: Array) -> Array:
    """Return AWQ's 4-bit codes `[r, 8·c]` of words `[r, c]`.

    >>> unpack_awq(np.array([[0x75316420]], np.int32)).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    found = unpack_words(words, 4, 1).reshape(len(words), -1, 8)
    result: Array = found[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1)
    return result
