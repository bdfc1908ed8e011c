"""What passes between the engine room and its callers: options, subgraphs with their profiles, reports."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from tmc_export.core.errors import LegalityError
from tmc_export.core.registry import nearest

__all__ = ["FLAVOURS", "RTX_CAPABILITIES", "EngineOptions", "EngineReport", "LayerInfo", "Profile", "Subgraph"]

FLAVOURS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Recipe name of a runtime -> the Python module that builds for it."""

RTX_CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
"""What TensorRT-RTX 1.7 compiles for. No Jetson is among them: Orin is SM87, Thor SM110."""

_VERBOSITIES = ("detailed", "layer_names_only", "none")


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built.

    Attributes:
        flavour: `"tensorrt-rtx"` (any machine, for the named GPUs) or `"tensorrt"` (on the device, for the device).
        capabilities: compute capabilities of the target, `"SM89"`; required for `tensorrt-rtx`, because an engine built
            without them claims more GPUs than it runs on. `tensorrt` builds for the GPU it runs on and ignores them.
        workspace_mib: limit of scratch memory in MiB; `None` leaves TensorRT's own limit.
        builder_optimization_level: 0 (fast build) to 5.
        verbosity: what the engine remembers of its layers; layer reports need `"detailed"`.
        timing_cache: file of measured kernels that later builds reuse; `tensorrt` only (TensorRT-RTX measures nothing here).
        check_memory: refuse before the build when the estimate exceeds the free memory.

    Raises:
        LegalityError: a value no builder takes.
    """

    flavour: str = "tensorrt-rtx"
    capabilities: tuple[str, ...] = ("SM89",)
    workspace_mib: int | None = None
    builder_optimization_level: int = 3
    verbosity: str = "detailed"
    timing_cache: Path | None = None
    check_memory: bool = True

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            guess = nearest(self.flavour, FLAVOURS)
            raise LegalityError(f"no engine of kind '{self.flavour}'{guess}; choose one of: {', '.join(FLAVOURS)}")
        if self.verbosity not in _VERBOSITIES:
            raise LegalityError(f"verbosity '{self.verbosity}' is unknown; choose one of: {', '.join(_VERBOSITIES)}")
        if not 0 <= self.builder_optimization_level <= 5:
            raise LegalityError(f"builder_optimization_level={self.builder_optimization_level} is outside 0..5; 3 is the default")
        if self.workspace_mib is not None and self.workspace_mib <= 0:
            raise LegalityError(f"workspace_mib={self.workspace_mib} must be positive, or left out")
        if self.flavour == "tensorrt-rtx":
            self._check_capabilities()

    def _check_capabilities(self) -> None:
        if not self.capabilities:
            raise LegalityError("no compute capability named; TensorRT-RTX needs at least one, e.g. SM89 for an RTX 4090")
        for name in self.capabilities:
            if not re.fullmatch(r"SM\d+", name) or name not in RTX_CAPABILITIES:
                raise LegalityError(
                    f"TensorRT-RTX cannot build for '{name}'; it serves {', '.join(RTX_CAPABILITIES)}; "
                    "a Jetson builds its own engines on the device: build_on_device.sh"
                )


@dataclass(frozen=True)
class Profile:
    """One static shape of a graph (minimum, optimum and maximum are equal).

    Attributes:
        name: `"prefill"`, `"decode"`, `"chunk"` or `"static"`.
        shapes: input name -> dimensions; inputs whose shape is static in the graph may be left out.
    """

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Subgraph:
    """One engine to build.

    Attributes:
        name: `"block_0"`; also the stem of the engine's file.
        onnx: path of the graph below the bundle, with `/`.
        precision: `"float16"`, `"float32"`, a weight scheme, or `"widened"` (16 bits beside float32); only the estimate of
            memory depends on it.
        profiles: at least one.
    """

    name: str
    onnx: str
    precision: str
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class LayerInfo:
    """One layer of the built engine.

    Attributes:
        name, kind: as TensorRT names it, e.g. `_gemm_mha_v2_myl0_3` of kind `kgen`.
        constants: types of the stored tensors that it reads, each once, as TensorRT names them: `Half`, `Int8`, `Int4`, `FP8`, `FP4E2M1`.
    """

    name: str
    kind: str
    constants: tuple[str, ...] = ()

    @property
    def attention(self) -> bool:
        """True for a fused multi-head attention kernel."""
        return "mha" in self.name.lower()


@dataclass(frozen=True)
class EngineReport:
    """A built engine.

    Attributes:
        name: the subgraph's name.
        path: the engine file.
        flavour, version: TensorRT kind and exact version; an engine runs only on that version.
        capabilities: compute capabilities it was built for.
        size: bytes of the engine file.
        seconds: wall time of the build; 0 when an engine that was already there is kept.
        peak_rss: highest resident memory of the building process, bytes.
        layers: the layers of all profiles; empty when the log had none (verbosity below `detailed`).
        multi_head_attention: fused attention kernels, summed over the profiles.
        activation_bytes: activation memory of each profile as the builder printed it; empty when it printed none.
        profiles: names of the profiles, in the engine's order.
        warnings: what the builder warned of, in its words.
        built: False when a valid engine was there already.
        cached: it was taken from this machine's cache of engines.
    """

    name: str
    path: Path
    flavour: str
    version: str
    capabilities: tuple[str, ...]
    size: int
    seconds: float
    peak_rss: int
    layers: tuple[LayerInfo, ...]
    multi_head_attention: int
    activation_bytes: tuple[int, ...]
    profiles: tuple[str, ...]
    warnings: tuple[str, ...] = field(default=())
    built: bool = True
    cached: bool = False
