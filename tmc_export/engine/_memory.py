"""Free memory, and what building an engine needs of it."""

from __future__ import annotations

from pathlib import Path

from tmc_export.core.errors import BundleError, ResourceError

__all__ = ["available_bytes", "check_memory", "estimate_bytes", "gib", "peak_rss_bytes"]

_FACTOR_ELSE = 2.4
_FACTOR = {"int4": 3.0, "nvfp4": 3.0, "widened": 2 * _FACTOR_ELSE}
_BASE = 768 * 2**20
"""Measured peaks (see docs/adr/0005): 3.3 GiB for 0.94 of fp16 weights, 8.2 for 2.88, 14.1 for 5.75; int4 12.8 for 4.07."""

_CGROUP = Path("/sys/fs/cgroup")


def gib(size: int) -> str:
    """`"1.5 GiB"`."""
    return f"{size / 2**30:.1f} GiB"


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Return the bytes a new process may take, a container's limit included; `None` where the system does not say."""
    free: int | None = None
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        limit, used = (cgroup / "memory.max").read_text().strip(), (cgroup / "memory.current").read_text().strip()
        if limit.isdigit() and used.isdigit():
            left = max(0, int(limit) - int(used))
            free = left if free is None else min(free, left)
    except OSError:
        return free
    return free


def peak_rss_bytes() -> int:
    """Return this process's own highest resident memory; 0 where the system does not say.

    `getrusage` is not used: what it reports survives exec, so a child would report its parent's peak.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def estimate_bytes(graph_bytes: int, weight_files: tuple[Path, ...], precision: str) -> int:
    """Estimate the peak resident memory of a build from the bytes of the graph and its weight files; `"widened"` ones double in it.

    Raises:
        BundleError: a weight file is missing.
    """
    total = graph_bytes
    for path in weight_files:
        try:
            total += path.stat().st_size
        except OSError as error:
            raise BundleError(f"the weight file '{path}' cannot be read: {error.strerror}; build the bundle again") from error
    return int(total * _FACTOR.get(precision, _FACTOR_ELSE)) + _BASE


def check_memory(name: str, needed: int, available: int | None) -> None:
    """Refuse a build that would not fit.

    Raises:
        ResourceError: the estimate is above the free memory; gives both figures.
    """
    if available is not None and needed > available:
        raise ResourceError(
            f"building the engine of {name} needs about {gib(needed)} of memory and {gib(available)} are free; "
            "close other programs, add swap, or build the bundle with more, smaller decoder blocks (target.build_memory_gib)"
        )
