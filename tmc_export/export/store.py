"""One weight file per part, each tensor in it once, however many graphs read it.

A tensor is evaluated, written and forgotten; graphs then refer to it by file, offset and length. What a compress graph reads of the next
layer's query and key projections lies there a second time: the block reads them joined, as another tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from tmc_export.export.lazy_tensors import KeyedTensor

__all__ = ["Place", "WeightStore"]

_INLINE_BYTES = 1024
_ALIGN = 4096
_ALIGN_FROM = 1 << 16

Place = tuple[str, int, int]
"""Where a tensor lies: file, offset and length in bytes."""


class WeightStore:
    """Weight files of a bundle.

    Args:
        folder: the `onnx/` folder.
        kept: places of tensors that an earlier build has written, by key; they are not evaluated again.
        wrote: told of every tensor that was written: its key, its place and its bytes.
    """

    def __init__(
        self,
        folder: Path,
        kept: Mapping[str, Place] = MappingProxyType({}),
        wrote: Callable[[str, Place, bytes], None] = lambda key, place, data: None,
    ) -> None:
        self.folder = folder
        self._places = dict(kept)
        self._wrote = wrote

    def externalize(self, model: ir.Model, file: str) -> int:
        """Write the model's large initializers to `file` (unless they are stored already) and refer to them.

        Args:
            model: changed in place.
            file: name in the folder: `"block_0.data"`.

        Returns:
            Bytes written.
        """
        written = 0
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _INLINE_BYTES:
                if isinstance(tensor, KeyedTensor):
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
                continue
            data = None if isinstance(tensor, KeyedTensor) else tensor.tobytes()
            key = tensor.key + f"|{tensor.dtype}" if isinstance(tensor, KeyedTensor) else hashlib.sha256(data or b"").hexdigest()
            if key not in self._places:
                data = tensor.tobytes() if data is None else data
                place = self._append(file, data)
                self._wrote(key, place, data)
                self._places[key] = place
                written += place[2]
            location, offset, length = self._places[key]
            value.const_value = ir.ExternalTensor(
                location, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=self.folder
            )
        return written

    def _append(self, file: str, data: bytes) -> Place:
        path = self.folder / file
        with path.open("ab") as out:
            offset = out.tell()
            if len(data) >= _ALIGN_FROM and offset % _ALIGN:
                out.write(b"\0" * (_ALIGN - offset % _ALIGN))
                offset = out.tell()
            out.write(data)
        return file, offset, len(data)
