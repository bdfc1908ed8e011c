"""Rooms import one way, and heavy packages stay where they belong; the table is in tools/rooms.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.rooms import ROOMS, modules, problems


def write(repository: Path, place: str, text: str) -> None:
    path = repository / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_the_tree_keeps_the_table(repository: Path) -> None:
    count, lines = problems(repository)
    assert not lines, "\n".join(lines)
    # Another sweep of its own: every .py file of the package is read once, those behind the symlinks too.
    files = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(repository / "tmc_export", followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    assert count == len(files) > 20


def test_every_room_of_the_tree_is_seen(repository: Path) -> None:
    seen = {room for room, _ in modules(repository)}
    assert {"core", "graphs", "families", "cli", "commands", "__init__"} <= seen
    folders = {p.name for p in (repository / "tmc_export").iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders <= seen <= set(ROOMS)


@pytest.mark.parametrize(
    ("place", "text", "says"),
    [
        ("tmc_export/runtime/bad.py", "import torch\n", "never imports torch"),
        ("tmc_export/runtime/bad.py", "def f():\n    from transformers import AutoConfig\n", "never imports transformers"),
        ("tmc_export/runtime/bad.py", "from tmc_export.core.lazy import require\nrequire('torch', extra='x')\n", "never imports torch"),
        ("tmc_export/runtime/bad.py", "from tmc_export.graphs import METHODS\n", "not 'graphs'"),
        ("tmc_export/runtime/bad.py", "from tmc_export import plan\n", "not 'plan'"),
        ("tmc_export/core/bad.py", "import numpy\n", "standard library only"),
        ("tmc_export/core/bad.py", "def f():\n    import tmc_export.recipe\n", "no other room"),
        ("tmc_export/plan/bad.py", "from tmc_export.surgery import block\n", "not 'surgery'"),
        ("tmc_export/plan/bad.py", "def f():\n    import torch\n", "never imports torch"),
        ("tmc_export/families/bad.py", "if True:\n    import torch\n", "only inside a function"),
        ("tmc_export/families/bad.py", "try:\n    import torch\nexcept ImportError:\n    pass\n", "only inside a function"),
        ("tmc_export/passes/bad.py", "class A:\n    import onnx\n", "only inside a function"),
        ("tmc_export/export/deep/er/bad.py", "from tmc_export.surgery import block\n", "not 'surgery'"),
        ("tmc_export/bundle/bad.py", "from . import manifest\n", "relative import"),
        ("tmc_export/attic/bad.py", "", "is no room"),
    ],
)
def test_a_bad_module_is_reported(tmp_path: Path, place: str, text: str, says: str) -> None:
    write(tmp_path, place, text)
    count, lines = problems(tmp_path)
    assert count == 1
    assert len(lines) == 1 and says in lines[0] and lines[0].startswith(place + ":")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("tmc_export/families/good.py", "def f():\n    import torch\n"),
        ("tmc_export/families/good.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor\n"),
        ("tmc_export/surgery/good.py", "import torch\nfrom tmc_export.graphs import METHODS\n"),
        ("tmc_export/runtime/good.py", "import onnxruntime\nfrom tmc_export.bundle import manifest\n"),
    ],
)
def test_a_good_module_is_not(tmp_path: Path, place: str, text: str) -> None:
    write(tmp_path, place, text)
    assert problems(tmp_path) == (1, [])


def test_the_count_grows_with_the_tree_and_follows_symlinks(tmp_path: Path) -> None:
    write(tmp_path, "tmc_export/core/__init__.py", "")
    assert problems(tmp_path)[0] == 1
    write(tmp_path, "graphs/deep/er.py", "import torch\n")
    (tmp_path / "tmc_export" / "graphs").symlink_to("../graphs")
    count, lines = problems(tmp_path)
    assert count == 2 and len(lines) == 1 and lines[0].startswith("graphs/deep/er.py:1:")
