"""What the benchmarks of the 7B model measure and judge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run_all
from benchmarks._tree import run_json_in_tree
from benchmarks.llava7b_engines import rows_of


def test_every_benchmark_that_run_all_names_is_there() -> None:
    folder = Path(run_all.__file__).parent
    assert [name for name in run_all.NAMES if not (folder / f"{name}.py").is_file()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_what_a_process_starts_counts() -> None:
    """Of a process that holds little and waits for one that holds 100 MiB, the sum is above 100 MiB; JSON of the first comes back."""
    inner = "import time; held = bytearray(100 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.6)"
    outer = f"import json, subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True); print(json.dumps({{'n': 7}}))"
    said, used = run_json_in_tree([sys.executable, "-c", outer])
    assert said == {"n": 7} and used["seconds"] > 0.6
    assert 110 < used["rss_mib"] < 200 and 100 < used["anonymous_mib"] < used["rss_mib"] and used["pss_mib"] <= used["rss_mib"]
    _, alone = run_json_in_tree([sys.executable, "-c", "import time; time.sleep(0.3); print('{}')"])
    assert alone["rss_mib"] < 60


def _built(rss_mib: float, peak: int) -> dict[str, Any]:
    engine = {"engine": "block_0", "engine_bytes": 10**9, "weights_bytes": 10**9, "seconds": 1.0, "reckoned_peak_bytes": 3 * 10**9}
    used = {"rss_mib": rss_mib, "pss_mib": rss_mib, "seconds": 9.0, "steps": {"export block_0": 2.0}}
    return {**used, "engines": [{**engine, "peak_bytes": peak}]}


@pytest.mark.parametrize(
    ("rss_mib", "peak", "refused", "wrong"),
    [
        (19000, 3 * 10**9, "why", set()),
        (19100, 3 * 10**9, "why", {"peak resident"}),
        (19000, 34 * 10**8, "why", {"peak of building"}),
        (19000, 3 * 10**9, None, {"float16"}),
    ],
)
def test_rows_of_7b_say_what_is_not_met(rss_mib: float, peak: int, refused: str | None, wrong: set[str]) -> None:
    board = {"blocks": [[0, 2], [2, 32]], "build_bytes": 1, "run_bytes": 2, "free_bytes": 3}
    rows = rows_of({"20 GB": _built(rss_mib, peak)}, board, {} if refused is None else {"refused": refused})
    found = {row["what"] for row in rows if row.get("ok") is False}
    assert len(found) == len(wrong) and all(any(part in what for what in found) for part in wrong)
