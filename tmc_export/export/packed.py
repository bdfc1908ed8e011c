"""Linears that a checkpoint stores as codes: found by the names of their tensors, checked by their headers, read when they are asked for.

`PackedMatrix` is the one place where codes become weights: the exporter takes its codes, scales and zero points as they are, and whoever
asks the checkpoint for the weight itself (the reference, eager runs, compress graphs) gets `scale · (code - zero point)`.

Legend: K input channels, N output channels, G groups of input channels that share a scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tmc_export.core.errors import ModelError
from tmc_export.core.stored_codes import StoredScheme, read_stored_scheme
from tmc_export.export.packed_layouts import unpack_awq, unpack_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["FLOATS", "Header", "PackedMatrix", "Place", "find_packed", "scheme_of"]

Place = tuple[Path, str]
"""A file and a tensor's key in it."""
Header = tuple[tuple[int, ...], str]
"""A tensor's shape and safetensors' name of its dtype."""

_PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gptq": (("qweight", "qzeros", "scales"), ("g_idx",)),
    "awq": (("qweight", "qzeros", "scales"), ()),
    "packed": (("weight_packed", "weight_scale"), ("weight_shape", "weight_zero_point", "weight_g_idx")),
    "plain": (("weight", "weight_scale"), ("weight_zero_point", "weight_g_idx")),
}
"""Layout → the tensors of a linear that must be there, and those that may."""
_CODES = {"int4": ("I32",), "int8": ("I8",), "fp8": ("F8_E4M3",)}
"""What the codes of one element each are stored as; 4-bit codes are none."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of tensors that stand for themselves, as safetensors names them."""


def scheme_of(folder: Path) -> StoredScheme | None:
    """Read how a model folder's linears are stored; None where they are as they are, or where there is no config.json.

    Raises:
        ModelError: config.json is damaged, or names a method or format that is not read.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}; fetch the model again") from error
    return read_stored_scheme(config) if isinstance(config, dict) else None


def find_packed(files: Mapping[str, Path], scheme: StoredScheme) -> dict[str, dict[str, Place]]:
    """Find the tensors that linears are stored in.

    Args:
        files: tensor's key → its file.
        scheme: how they are stored.

    Returns:
        A linear's name in the file's layout → its tensors there (`qweight`, …) → where each is.

    >>> find_packed({"layers.0.up.qweight": Path("a"), "layers.0.up.bias": Path("a")}, StoredScheme("gptq", "gptq", "int4", 128))
    {'layers.0.up': {'qweight': (PosixPath('a'), 'layers.0.up.qweight')}}
    """
    needed, optional = _PARTS[scheme.layout]
    found: dict[str, dict[str, Place]] = {}
    for key, path in files.items():
        module, _, part = key.rpartition(".")
        if part in (*needed, *optional) and part != "weight":
            found.setdefault(module, {})[part] = path, key
    for module, places in found.items() if "weight" in needed else ():
        if (key := f"{module}.weight") in files:
            places["weight"] = files[key], key
    return found


@dataclass(frozen=True)
class PackedMatrix:
    """One linear's weight as codes.

    Attributes:
        name: what the weight is called in the file's layout: `language_model.model.layers.0.mlp.up_proj.weight`.
        scheme: how all of them are stored.
        shape: K and N.
        places: part (`qweight`, …) → where it is.
        read: reads a tensor as it is stored.
    """

    name: str
    scheme: StoredScheme
    shape: tuple[int, int]
    places: Mapping[str, Place]
    read: Callable[[Path, str], Tensor] = field(repr=False, compare=False)

    @property
    def groups(self) -> int:
        """G."""
        return self.shape[0] // self.scheme.group if self.scheme.group else 1

    def codes(self) -> Array:
        """Codes `[K, N]` in the order of `order`: signed ones (int8, or E4M3 of `ml_dtypes`) where there are no zero points, else uint8."""
        if self.scheme.weights == "fp8":
            import ml_dtypes

            return self._part("weight").view(torch.uint8).numpy().T.view(ml_dtypes.float8_e4m3fn)
        plain, order = self._unsigned(), self.order()
        plain = plain if order is None else np.ascontiguousarray(plain[order])
        return plain if self.zero_points() is not None else _signed(plain, self.scheme.bits)

    def order(self) -> Array | None:
        """Input channels, int64 `[K]`, the first group's first; None where groups are channels in a row already.

        Raises:
            ModelError: groups are of other sizes, or scattered although config.json does not say so.
        """
        part = next((p for p in ("g_idx", "weight_g_idx") if p in self.places), None)
        found = None if part is None else self._part(part).numpy().astype(np.int64)
        each = self.scheme.group or self.shape[0]
        if found is None or (found == -1).all() or np.array_equal(found, np.arange(self.shape[0]) // each):
            return None
        if not self.scheme.scattered:
            raise ModelError(
                f"the groups of '{self.name}' are scattered over its input channels ({part}), and config.json does not say so (desc_act, "
                "or actorder); the two do not belong together: fetch the model again"
            )
        if not np.array_equal(np.sort(found), np.arange(self.shape[0]) // each):
            raise ModelError(f"the groups of '{self.name}' ({part}) are not {self.groups} of {each} input channels; fetch the model again")
        return np.argsort(found, kind="stable")

    def zero_points(self) -> Array | None:
        """Zero points uint8 `[G, N]`; None where all of them are the middle of the codes, which makes signed codes without any.

        Raises:
            ModelError: config.json says that there are none but the middle, and there are.
        """
        found = None if self.scheme.weights == "fp8" else self._zeros()
        middle = 1 << (self.scheme.bits - 1)
        if found is None or (found == middle).all():
            return None
        if self.scheme.symmetric:
            hint = "; of GPTQ checkpoints, checkpoint_format (gptq or gptq_v2) may be the wrong one" if self.scheme.layout == "gptq" else ""
            raise ModelError(
                f"'{self.name}' has a zero point of {int(found[found != middle][0])}, and config.json says that they are symmetric, "
                f"{middle}{hint}; the two do not belong together: fetch the model again"
            )
        return found

    def scales(self, dtype: torch.dtype) -> Tensor:
        """Scales `[G, N]`.

        Raises:
            ModelError: float16 cannot hold them.
        """
        key = "scales" if self.scheme.layout in ("gptq", "awq") else "weight_scale"
        stored = self._part(key)
        if self.scheme.layout in ("packed", "plain"):
            stored = stored.reshape(1, 1).expand(1, self.shape[1]) if stored.numel() == 1 else stored.reshape(self.shape[1], -1).T
        found, wide = stored.to(dtype), stored.float()
        if not bool(torch.isfinite(found).all()) or bool(((found.float() - wide).abs() > wide.abs() * 2.0**-10).any()):
            raise ModelError(f"the scales of '{self.name}' are not numbers that {dtype} holds; build with model.dtype: float32")
        return found.contiguous()

    def dense(self) -> Tensor:
        """The weight `[N, K]` in float32: each code less its zero point, times its scale."""
        codes, zeros = torch.from_numpy(self.codes().astype(np.float32)), self.zero_points()
        grouped = codes.reshape(self.groups, -1, self.shape[1])
        if zeros is not None:
            grouped = grouped - torch.from_numpy(zeros.astype(np.float32))[:, None]
        weight, order = (grouped * self.scales(torch.float32)[:, None]).reshape(self.shape), self.order()
        if order is not None:
            weight = weight[torch.from_numpy(np.argsort(order))]
        return weight.T.contiguous()

    def check(self, headers: Callable[[Path], Mapping[str, Header]]) -> None:
        """Compare the tensors' headers with what the layout says, and the order of the groups with what config.json says.

        Raises:
            ModelError: a tensor is missing, has another shape or type, or groups are scattered where they should not be.
        """
        needed, _ = _PARTS[self.scheme.layout]
        lacking = [part for part in needed if part not in self.places]
        if not self.scheme.symmetric and self.scheme.layout in ("packed", "plain") and "weight_zero_point" not in self.places:
            lacking.append("weight_zero_point")
        if lacking:
            raise ModelError(f"'{self.name}' is stored as codes and lacks its {lacking[0]}; fetch the model again")
        if self.scheme.group and self.shape[0] % self.scheme.group:
            raise ModelError(
                f"the {self.shape[0]} input channels of '{self.name}' are no multiple of its groups of {self.scheme.group}, which is not "
                "read; quantize the model with another group size"
            )
        wanted = self._shapes()
        for part, (path, key) in self.places.items():
            held = headers(path).get(key)
            if held is None:
                raise ModelError(f"{path} lacks the tensor '{key}' that the index puts there; fetch the model again")
            if part in wanted and held[0] not in wanted[part][0]:
                shapes = " or ".join(str(list(s)) for s in wanted[part][0])
                raise ModelError(
                    f"{path}: tensor '{key}' has shape {list(held[0])}, {self.scheme.says} of {self.shape[1]} by {self.shape[0]} weights "
                    f"has {shapes}; config.json and weights do not belong together"
                )
            if part in wanted and held[1] not in wanted[part][1]:
                types = " or ".join(sorted(wanted[part][1]))
                raise ModelError(f"{path}: tensor '{key}' holds {held[1]}, {self.scheme.says} has {types}; fetch the model again")
        self.order()

    def _shapes(self) -> dict[str, tuple[tuple[tuple[int, ...], ...], frozenset[str]]]:
        """Part → shapes and types that it may have."""
        (k, n), g, each = self.shape, self.groups, 32 // self.scheme.bits
        words = frozenset({"I32"})
        if self.scheme.layout in ("gptq", "awq"):
            codes = (k // each, n) if self.scheme.layout == "gptq" else (k, n // each)
            return {"qweight": ((codes,), words), "qzeros": (((g, n // each),), words), "scales": (((g, n),), FLOATS)}
        scales: tuple[tuple[int, ...], ...] = ((n, g),) if self.scheme.group else ((n, 1), (n,), (1,), ())
        found: dict[str, tuple[tuple[tuple[int, ...], ...], frozenset[str]]] = {"weight_scale": (scales, FLOATS)}
        if self.scheme.layout == "packed":
            found["weight_packed"] = (((n, -(-k // each)),), words)
            zeros: tuple[tuple[int, ...], ...] = ((-(-n // each), g), (n, g))
            found["weight_zero_point"] = (zeros, words | {"I8"})
            return found
        found["weight"] = (((n, k),), frozenset(_CODES[self.scheme.weights]))
        found["weight_zero_point"] = (scales, frozenset({"I8", "I32", "I64"}))
        return found

    def _part(self, part: str) -> Tensor:
        return self.read(*self.places[part])

    def _unsigned(self) -> Array:
        """Codes uint8 `[K, N]`, 0 to `2^bits - 1`."""
        bits, layout = self.scheme.bits, self.scheme.layout
        if layout == "gptq":
            return unpack_words(self._part("qweight").numpy(), bits, 0)
        if layout == "awq":
            return unpack_awq(self._part("qweight").numpy())
        if layout == "packed":
            return np.ascontiguousarray(unpack_words(self._part("weight_packed").numpy(), bits, 1)[:, : self.shape[0]].T)
        return np.ascontiguousarray(_shifted(self._part("weight").numpy(), bits).T)

    def _zeros(self) -> Array | None:
        """Zero points uint8 `[G, N]` beside unsigned codes; None where the file has none."""
        bits, layout = self.scheme.bits, self.scheme.layout
        if layout == "awq":
            return unpack_awq(self._part("qzeros").numpy())
        if layout == "gptq":
            stored = unpack_words(self._part("qzeros").numpy(), bits, 1)
            if self.scheme.zero_bias and (stored == 2**bits - 1).any():
                raise ModelError(
                    f"'{self.name}' has a zero point of {2**bits}, stored as {2**bits - 1}: GPTQ's first format loses such ones, and its "
                    "readers disagree about them; save the checkpoint as gptq_v2, or quantize it with sym: true"
                )
            return stored + np.uint8(self.scheme.zero_bias)
        if "weight_zero_point" not in self.places:
            return None
        stored = self._part("weight_zero_point").numpy()
        if stored.dtype == np.int32 and len(stored) == -(-self.shape[1] * bits // 32):
            return np.ascontiguousarray(unpack_words(stored, bits, 0)[: self.shape[1]].T)
        plain = _shifted(stored.astype(np.int8), bits).reshape(-1, stored.shape[-1] if stored.ndim > 1 else 1)
        return np.ascontiguousarray(np.broadcast_to(plain, (self.shape[1], plain.shape[1])).T)


def _signed(codes: Array, bits: int) -> Array:
    return (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def _shifted(codes: Array, bits: int) -> Array:
    """Signed codes int8 → uint8, half of the range added."""
    return (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
