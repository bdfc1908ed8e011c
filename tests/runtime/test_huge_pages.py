"""Huge pages: which memory is asked for, and that a session's weights lie in them where the system has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tmc_export.runtime import _huge_pages
from tmc_export.runtime._backend import BackendOptions
from tmc_export.runtime._huge_pages import HUGE_PAGE, huge_pages, mappings, new_spans
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend

MAPS = """\
55d0c0000000-55d0c0002000 r-xp 00000000 fe:00 12 /usr/bin/python
55d0c1000000-55d0c1c00000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
7f0000400000-7f0000500000 ---p 00000000 00:00 0
7f0000600000-7f0000a00000 rw-s 00000000 00:05 7 /dev/shm/a name
7f0000b00000-7f0000c00000 rw-p 00100000 fe:00 12 /usr/lib/libc.so.6
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
"""


def test_only_writable_private_memory_without_a_file_counts() -> None:
    assert mappings(MAPS) == [(0x55D0C1000000, 0x55D0C1C00000), (0x7F0000000000, 0x7F0000400000)]


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ([], [(0, 40)], [(0, 40)]),
        ([], [(3, 47)], [(10, 40)]),
        ([], [(3, 12)], []),
        ([(0, 40)], [(0, 40)], []),
        ([(0, 25)], [(0, 60)], [(30, 60)]),
        ([(20, 30), (50, 51)], [(0, 80)], [(0, 20), (30, 50), (60, 80)]),
        ([(0, 5), (35, 90)], [(10, 40), (100, 120)], [(10, 30), (100, 120)]),
        ([(0, 100)], [(20, 60)], []),
    ],
)
def test_what_is_new_in_whole_pages(before: list[tuple[int, int]], after: list[tuple[int, int]], found: list[tuple[int, int]]) -> None:
    assert new_spans(before, after, 10) == found


def test_nothing_is_asked_for_where_the_kernel_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    enabled = tmp_path / "enabled"
    for text in ("[always] madvise never", "always madvise [never]", None):
        if text is None:
            enabled.unlink()
        else:
            enabled.write_text(text)
        monkeypatch.setattr(_huge_pages, "_ENABLED", enabled)
        monkeypatch.setattr(_huge_pages, "_MAPS", tmp_path / "must not be read")
        _huge_pages._madvise.cache_clear()
        with huge_pages(True):
            pass
    _huge_pages._madvise.cache_clear()


def test_every_new_page_is_asked_for_and_none_when_not_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[int, int, int]] = []
    maps = tmp_path / "maps"
    maps.write_text("0-200000 rw-p 00000000 00:00 0\n")
    monkeypatch.setattr(_huge_pages, "_MAPS", maps)
    monkeypatch.setattr(_huge_pages, "_madvise", lambda: lambda *a: asked.append(a) or 0)
    for wanted in (False, True):
        with huge_pages(wanted):
            maps.write_text("0-200000 rw-p 00000000 00:00 0\n400000-a80000 rw-p 00000000 00:00 0\n")
        assert asked == ([(0x400000, 0x600000, 14), (0x400000, 0x600000, 25)] if wanted else [])
        maps.write_text("0-200000 rw-p 00000000 00:00 0\n")


def _resident_huge() -> int:
    lines = Path("/proc/self/smaps").read_text("utf-8", "replace").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


def test_packed_weights_lie_in_huge_pages(tmp_path: Path) -> None:
    if _huge_pages._madvise() is None:
        pytest.skip("this kernel does not give huge pages on request")
    weight = np.random.default_rng(0).standard_normal((2048, 4096), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [helper.make_tensor_value_info("x", 1, [1, 2048])],
        [helper.make_tensor_value_info("y", 1, [1, 4096])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    x = np.random.default_rng(1).standard_normal((1, 2048), np.float32)
    found, taken = [], []
    for wanted in (False, True):
        before = _resident_huge()
        graph_ = OnnxRuntimeBackend(tmp_path, BackendOptions(threads=1, huge_pages=wanted)).graph("g.onnx")
        taken.append(_resident_huge() - before)
        found.append(graph_.run({"x": x})["y"])
        del graph_
    assert taken[1] - taken[0] >= weight.nbytes // 2 and taken[0] < HUGE_PAGE * 4
    np.testing.assert_array_equal(found[0], found[1])
