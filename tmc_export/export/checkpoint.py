"""A checkpoint's weights by state-dict name: found across shards, renamed as transformers renames, read one tensor at a time.

Renaming rules and converters come from transformers itself (`get_model_conversion_mapping`), so that old hub layouts load as
`from_pretrained` loads them. Linears that are stored as codes (`packed.py`) read as the weights that their codes stand for. Only
safetensors files are read: never pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tmc_export.core.errors import ModelError
from tmc_export.core.stored_codes import StoredScheme
from tmc_export.export.packed import FLOATS, Header, PackedMatrix, find_packed, scheme_of

__all__ = ["Checkpoint", "TensorSource", "narrow", "open_checkpoint", "read_raw", "wrong_shape"]

_CODES = frozenset({"qweight", "weight_packed", "weight"})
"""Tensors that hold the codes of a linear; the others go with one."""


class TensorSource(Protocol):
    """Where tensors are read by name, one at a time: a checkpoint, or the learned weights of a method."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of every tensor."""
        ...

    def identity(self, name: str) -> str:
        """Say which bytes a tensor has; equal identities mean equal bytes."""
        ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read one tensor as `dtype`."""
        ...


@dataclass(frozen=True)
class _Source:
    """Where one tensor of the model comes from: file and key, per part when a converter joins several."""

    parts: tuple[tuple[Path, str], ...]
    converter: Any = None


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder.

    Attributes:
        folder: the model folder.
        sources: state-dict name → where it is.
        shapes: state-dict name → shape the model expects.
        packed: state-dict name → the codes of a weight that is stored so, which has no source.
    """

    folder: Path
    sources: Mapping[str, _Source]
    shapes: Mapping[str, tuple[int, ...]]
    packed: Mapping[str, PackedMatrix] = field(default_factory=dict)

    def identity(self, name: str) -> str:
        """Say which bytes a tensor has: tied names have one identity."""
        return self.packed[name].name if name in self.packed else "+".join(key for _, key in self.sources[name].parts)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read one tensor.

        Args:
            name: state-dict name in the model.
            dtype: what to return; a value that float16 cannot hold is an error, not an infinity.

        Raises:
            ModelError: the file is damaged, the shape differs, or a value overflows `dtype`.
        """
        if name in self.packed:
            return narrow(self.packed[name].dense(), name, dtype)
        source = self.sources[name]
        parts = [read_raw(path, key) for path, key in source.parts]
        tensor = parts[0] if source.converter is None else _convert(source, parts, name)
        if tuple(tensor.shape) != self.shapes[name]:
            raise wrong_shape(*source.parts[0], tuple(tensor.shape), self.shapes[name])
        return narrow(tensor, name, dtype)


def narrow(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Bring a tensor to the plan's dtype.

    Raises:
        ModelError: it holds a value that float16 cannot.
    """
    if dtype == torch.float16 and tensor.dtype != torch.float16:
        peak = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not peak <= torch.finfo(torch.float16).max:
            raise ModelError(f"tensor '{name}' holds {peak:g}, above float16's 65504; build with model.dtype: float32")
    return tensor.to(dtype)


def read_raw(path: Path, key: str) -> Tensor:
    """Read one tensor as it is stored.

    Raises:
        ModelError: the file is damaged, or has no such tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot read tensor '{key}' of {path}: {error}; the file is damaged or incomplete: fetch it again") from error


def _convert(source: _Source, parts: list[Tensor], name: str) -> Tensor:
    converter = source.converter
    collected: Any = {pattern: parts if len(parts) > 1 else parts[0] for pattern in converter.source_patterns[:1]}
    for operation in converter.operations:
        collected = operation.convert(collected, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns)
    values = list(collected.values())
    if len(values) != 1:
        raise ModelError(f"the checkpoint's tensors for '{name}' are stored in a form that is not served ({type(converter).__name__})")
    result: Tensor = values[0][0] if isinstance(values[0], list) else values[0]
    return result


def _files(folder: Path) -> dict[str, Path]:
    """Checkpoint key → file, from the shard index or the single file; every shard named must exist."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = {str(key): str(name) for key, name in json.loads(index.read_text("utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a shard index: {error}; fetch the model again") from error
        missing = sorted({name for name in listed.values() if not (folder / Path(name).name).is_file()})
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(set(listed.values()))} weight shards are missing: {', '.join(missing)}; fetch them"
            )
        return {key: folder / Path(name).name for key, name in listed.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        other = sorted(p.name for p in folder.glob("*.bin")) or sorted(p.name for p in folder.glob("*.pt*"))
        hint = f"; it has {other[0]}, a pickle file, which is never loaded: convert it to safetensors" if other else ""
        raise ModelError(f"{folder} holds no model.safetensors{hint}")
    return dict.fromkeys(_headers(single), single)


def _headers(path: Path) -> dict[str, Header]:
    """Key → shape and type, from a file's header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: (tuple(s.get_shape()), str(s.get_dtype())) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot open {path}: {error}; the file is damaged or incomplete: fetch it again") from error


def open_checkpoint(folder: Path, model: nn.Module) -> Checkpoint:
    """Match a folder's tensors with a model's state dict; nothing is loaded yet.

    Args:
        folder: a model folder with safetensors files.
        model: the model, weights on the meta device.

    Raises:
        ModelError: no weights, missing shards, or weights the model needs that no file has.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    whole: Any = model
    transforms = get_model_conversion_mapping(whole)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = dict(model.state_dict())
    shapes = {name: tuple(t.shape) for name, t in state.items()}

    def rename(key: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(key, renamings, converters, whole.base_model_prefix, state)
        return found

    files, stored = _files(folder), scheme_of(folder)
    packed = _matrices(files, stored, shapes, rename) if stored is not None else {}
    taken = {key for matrix in packed.values() for _, key in matrix.places.values()}
    parts: dict[str, list[tuple[Path, str]]] = {}
    chosen: dict[str, Any] = {}
    for key, path in sorted(files.items(), key=lambda item: _natural(item[0])):
        name, pattern = rename(key)
        if key not in taken:
            parts.setdefault(name, []).append((path, key))
        if pattern is not None:
            chosen[name] = by_pattern[pattern]
    sources = {name: _Source(tuple(p), chosen.get(name)) for name, p in parts.items() if name in state}
    for name, twin in _ties(whole).items():
        if name not in sources and twin in sources:
            sources[name] = sources[twin]
        elif twin not in sources and name in sources:
            sources[twin] = sources[name]
    lost = sorted(set(state) - set(sources) - set(packed))
    if lost:
        raise ModelError(
            f"{folder} lacks {len(lost)} tensors that {type(model).__name__} needs, the first is '{lost[0]}'; "
            f"{_unexplained(files, stored) or 'the weights are incomplete or of another model'}"
        )
    headers = cache(_headers)
    _check_headers(sources, shapes, frozenset(name for name, t in state.items() if t.is_floating_point()), headers)
    for matrix in packed.values():
        matrix.check(headers)
    return Checkpoint(folder, sources, shapes, packed)


def _matrices(
    files: Mapping[str, Path], stored: StoredScheme, shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], tuple[str, str | None]]
) -> dict[str, PackedMatrix]:
    """State-dict name → codes, of every linear of the model that the files hold so.

    Raises:
        ModelError: a linear is joined of several, is there twice, or has a bias that the model has not; or scales go with no linear.
    """
    found: dict[str, PackedMatrix] = {}
    for module, places in find_packed(files, stored).items():
        name, pattern = rename(f"{module}.weight")
        if name not in shapes and _CODES.isdisjoint(places):
            (place, key), *_ = places.values()
            raise ModelError(
                f"{place}: '{key}' goes with no linear of the model: scales of something else are not read; name another checkpoint"
            )
        if name not in shapes:
            continue
        again = f"{module}.weight" in files and "weight" not in places
        if pattern is not None or len(shapes[name]) != 2 or name in found or again:
            raise ModelError(
                f"the codes of '{module}' do not stand for one matrix of the model, which alone are read; name another checkpoint"
            )
        path, bias = files.get(f"{module}.bias"), f"{module}.bias"
        if path is not None and rename(bias)[0] not in shapes and bool(read_raw(path, bias).any()):
            raise ModelError(
                f"{path}: '{bias}' is not zero, and the model has no such bias; config.json and weights do not belong together"
            )
        n, k = shapes[name]
        found[name] = PackedMatrix(f"{module}.weight", stored, (k, n), places, read_raw)
    return found


def _unexplained(files: Mapping[str, Path], stored: StoredScheme | None) -> str | None:
    """What to say of codes that config.json does not mention."""
    codes = next((key for key in sorted(files) if key.endswith((".qweight", ".weight_packed"))), None)
    if stored is not None or codes is None:
        return None
    return (
        f"it holds codes ('{codes}'), and config.json has no quantization_config that says what they mean: write it there (older GPTQ "
        "folders have it in quantize_config.json)"
    )


def _check_headers(
    sources: Mapping[str, _Source],
    shapes: Mapping[str, tuple[int, ...]],
    floating: frozenset[str],
    headers: Callable[[Path], Mapping[str, Header]],
) -> None:
    """Compare what the files' headers say with what the model expects, before hours are spent; joined tensors are checked when read.

    Raises:
        ModelError: a file cannot be opened, lacks a tensor that the index puts there, or holds it in another shape, or as bare codes.
    """
    for name, source in sources.items():
        for path, key in source.parts:
            held = headers(path).get(key)
            if held is None:
                raise ModelError(f"{path} lacks the tensor '{key}' that the index puts there; fetch the model again")
            if source.converter is None and held[0] != shapes[name]:
                raise wrong_shape(path, key, held[0], shapes[name])
            if name in floating and held[1] not in FLOATS:
                raise ModelError(
                    f"{path}: tensor '{key}' holds codes ({held[1]}), and nothing says what they stand for: no quantization_config in "
                    "config.json, or no scales beside them; fetch the model again"
                )


def wrong_shape(path: Path, key: str, held: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    """Return the error of a tensor of another shape than the model or the method expects."""
    return ModelError(
        f"{path}: tensor '{key}' has shape {list(held)}, the model expects {list(expected)}; config.json and weights do not belong together"
    )


def _ties(model: Any) -> dict[str, str]:
    """Tied name → the name it shares its tensor with; the output head also counts as tied where a checkpoint leaves it out."""
    by_object: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = by_object.setdefault(id(parameter), name)
        if first != name:
            ties[name] = first
    return ties


def _natural(key: str) -> tuple[object, ...]:
    return tuple(int(p) if p.isdigit() else p for p in re.split(r"(\d+)", key))
