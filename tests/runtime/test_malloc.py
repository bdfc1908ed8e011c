"""Large blocks go back to the system when they are freed: from now on, or those of a while."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tmc_export.runtime import _malloc
from tmc_export.runtime._malloc import LARGE, give_back_large_blocks, large_blocks_apart

KEPT = f"""
import contextlib, ctypes, re, sys
from tmc_export.runtime._malloc import give_back_large_blocks, large_blocks_apart
here = ctypes.CDLL(None)
here.malloc.restype, here.malloc.argtypes, here.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def block(size):
    found = here.malloc(size)
    ctypes.memset(found, 1, size)
    return found
if sys.argv[1] == "always":
    assert give_back_large_blocks()
here.free(block(30 << 20))
if sys.argv[1] == "behind":
    with large_blocks_apart():
        here.free(block({2 * LARGE}))
if sys.argv[1] == "always":
    with large_blocks_apart():
        pass
with large_blocks_apart() if sys.argv[1] == "inside" else contextlib.nullcontext():
    blocks = [block({2 * LARGE}) for _ in range(80)]
    for found in blocks[:-1]:
        here.free(found)
print(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
"""


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    monkeypatch.setattr(_malloc, "_set", lambda *_: pytest.fail("glibc was told something else"))
    with large_blocks_apart():
        pass


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's parameter")
def test_freed_blocks_leave_the_process() -> None:
    kept = {
        asked: int(subprocess.run([sys.executable, "-c", KEPT, asked], capture_output=True, text=True, check=True).stdout)
        for asked in ("never", "always", "inside", "behind")
    }
    for gone in ("always", "inside"):
        for stays in ("never", "behind"):
            assert kept[stays] - kept[gone] > 30 << 10, f"{stays}, {gone}: KiB; 39.5 MiB were freed below a block that stays"


def test_a_c_library_without_the_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr(_malloc, "_STATE", SimpleNamespace(always=False, inside=0))
    assert give_back_large_blocks() is False
    with large_blocks_apart():
        pass
