from __future__ import annotations

from pathlib import Path

from tmc_export.core.memory import total_bytes


def test_the_machine_or_its_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:     4096 kB\nMemAvailable:  1 kB\n")
    assert total_bytes(meminfo, tmp_path) == 4096 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert total_bytes(meminfo, tmp_path) == 4096 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert total_bytes(meminfo, tmp_path) == 1000000
    (tmp_path / "memory.max").write_text("9000000\n")
    assert total_bytes(meminfo, tmp_path) == 4096 * 1024
    assert total_bytes(tmp_path / "none", tmp_path / "none") is None
