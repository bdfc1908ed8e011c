"""How much memory this machine has, a container's limit included."""

from __future__ import annotations

from pathlib import Path

__all__ = ["total_bytes"]


def total_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the machine's memory in bytes, or what its container may take of it; None where the system does not say.

    What is free changes from minute to minute; this does not, so that a plan made for it stays the same.
    """
    found: list[int] = []
    try:
        found += [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemTotal:")]
        limit = (cgroup / "memory.max").read_text().strip()
        found += [int(limit)] if limit.isdigit() else []
    except OSError:
        pass  # not Linux, or no container
    return min(found, default=None)
