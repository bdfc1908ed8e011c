from __future__ import annotations

from pathlib import Path

import pytest

from tmc_export.core.errors import ResourceError
from tmc_export.engine._memory import available_bytes, check_memory, estimate_bytes

GIB = 2**30


# Peaks measured with TensorRT-RTX 1.7 on the CPU (docs/adr/0005): weights GiB, peak GiB. Within a quarter: a refusal must not be wild.
@pytest.mark.parametrize(
    ("weights", "precision", "peak"), [(0.94, "float16", 3.3), (2.88, "float16", 8.2), (5.75, "float16", 14.1), (4.07, "int4", 12.8)]
)
def test_the_estimate_is_near_what_was_measured(weights: float, precision: str, peak: float) -> None:
    assert 0.75 * peak < estimate_bytes(int(weights * GIB), (), precision) / GIB < 1.25 * peak


def test_16_bits_beside_float32_double() -> None:
    assert estimate_bytes(GIB, (), "widened") == estimate_bytes(2 * GIB, (), "float32") > estimate_bytes(GIB, (), "float16")


def test_free_memory_and_a_containers_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert available_bytes(meminfo, tmp_path) == 4096 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert available_bytes(meminfo, tmp_path) == 600000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 4096 * 1024
    assert available_bytes(tmp_path / "none", tmp_path / "none") is None


def test_refusal() -> None:
    check_memory("b", 5, None)
    check_memory("b", 5, 5)
    with pytest.raises(ResourceError, match=r"b needs about 2\.0 GiB of memory and 1\.0 GiB"):
        check_memory("b", 2 * GIB, GIB)
