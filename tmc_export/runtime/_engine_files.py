"""Which engine file, and which of its profiles, stands for a graph of the bundle; refused before TensorRT sees a file it cannot take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tmc_export.bundle.read import path_in
from tmc_export.core.errors import BundleError
from tmc_export.engine.bundle import EngineRecord, file_sha256, read_engines, same_release
from tmc_export.engine.profiles import read_profiles

__all__ = ["EngineFiles", "EnginePlace"]

_HASHED_BYTES = 64 << 20
"""Engines up to this size are hashed before they are loaded; of larger ones the size is checked."""


@dataclass(frozen=True)
class EnginePlace:
    """A graph's engine.

    Attributes:
        name: of the subgraph, `block_0`.
        path: the engine's file.
        profile: number of the graph's profile in it.
    """

    name: str
    path: Path
    profile: int


class EngineFiles:
    """The engines of a bundle for one kind of TensorRT.

    Args:
        folder: the bundle.
        flavour: `tensorrt` or `tensorrt-rtx`.
        version: of the TensorRT that is to run them.
        capability: of the GPU, `"SM89"`.

    Raises:
        BundleError: `engines/` is missing or damaged.
    """

    def __init__(self, folder: Path, flavour: str, version: str, capability: str) -> None:
        self._folder, self._flavour, self._version, self._capability = folder, flavour, version, capability
        self._records = {record.name: record for record in read_engines(folder) if record.flavour == flavour}
        self._profiles = {
            f"onnx/{graph.name}.onnx" if profile.name == "static" else f"onnx/{graph.name}_{profile.name}.onnx": (graph.name, profile.name)
            for graph in read_profiles(folder)
            for profile in graph.profiles
        }
        self._checked: set[str] = set()

    @property
    def again(self) -> str:
        """The command that builds the engines for this machine."""
        target = f" --capability {self._capability}" if self._flavour == "tensorrt-rtx" else ""
        return f"tmc-export engine {self._folder} --runtime {self._flavour}{target}"

    def find(self, file: str) -> EnginePlace:
        """Return the place of the engine for a graph of `onnx/`.

        Raises:
            BundleError: there is none, or it is of another TensorRT or GPU, or damaged.
        """
        if file not in self._profiles:
            raise BundleError(f"no engine is made of {file} (engines/profiles.json); build the bundle again")
        name, profile = self._profiles[file]
        record = self._records.get(name)
        if record is None:
            raise BundleError(f"{self._folder} has no {self._flavour} engine of {name}; build it with: {self.again}")
        if name not in self._checked:
            self._check(record)
            self._checked.add(name)
        if profile not in record.profiles:
            raise BundleError(f"the engine of {name} has no profile '{profile}' ({', '.join(record.profiles)}); rebuild with: {self.again}")
        return EnginePlace(name, path_in(self._folder, record.file), record.profiles.index(profile))

    def _check(self, record: EngineRecord) -> None:
        again = f"rebuild with: {self.again}"
        made = f"the engine of {record.name} was made by {record.flavour} {record.version}"
        if not same_release(record.version, self._version):
            raise BundleError(f"{made}, this machine has {self._version}; {again}")
        if record.capabilities and self._capability not in record.capabilities:
            raise BundleError(f"{made} for {', '.join(record.capabilities)}, this GPU is {self._capability}; {again}")
        path = path_in(self._folder, record.file)
        if not path.is_file():
            raise BundleError(f"the engine file {record.file} of {self._folder} is missing; {again}")
        size = path.stat().st_size
        if size != record.bytes:
            raise BundleError(f"the engine file {record.file} has {size} bytes, {record.bytes} were written; {again}")
        if size <= _HASHED_BYTES and file_sha256(path) != record.sha256:
            raise BundleError(f"the engine file {record.file} differs from what was built (sha256); {again}")
