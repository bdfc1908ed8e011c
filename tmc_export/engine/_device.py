"""Asks the CUDA driver, without any package, which GPU this machine has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CudaDevice", "cuda_device"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class CudaDevice:
    """The first GPU: name, compute capability (`"SM87"`), memory in MiB, and the CUDA version of the driver (`"12.6"`)."""

    name: str
    capability: str
    memory_mib: int
    driver_cuda: str


def cuda_device() -> CudaDevice | None:
    """Return the first GPU, or `None` without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    steps: tuple[Callable[[], int], ...] = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDriverGetVersion(ctypes.byref(version)),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceGetName(name, 256, device),
        lambda: cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    if any(step() != 0 for step in steps):
        return None
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return CudaDevice(name.value.decode(errors="replace"), f"SM{major.value}{minor.value}", memory.value // 2**20, driver)
