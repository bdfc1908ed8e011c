"""What is asked of TensorRT: mypy refuses what `tensorrt-stubs` do not have; the table of differences names what is used beyond them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tmc_export.engine._versions import DIFFERENCES, Difference
from tools import tensorrt_stubs

REPOSITORY = Path(__file__).parents[2]
CALLERS = tuple(REPOSITORY / "tmc_export" / name for name in ("engine/_build.py", "runtime/_tensorrt.py", "runtime/_engine_graph.py"))
STUB = tensorrt_stubs.place() / "tensorrt_bindings-stubs/tensorrt.pyi"

installed = pytest.mark.skipif(not STUB.is_file(), reason="needs tools/tensorrt_stubs.py")

CALLER = """
from __future__ import annotations
from typing import TYPE_CHECKING, cast
from types_of_tensorrt import RtxBuilderConfig, TensorRT
if TYPE_CHECKING:
    import tensorrt
def call(trt: TensorRT, logger: tensorrt.ILogger, parts: tuple[str, ...]) -> None:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    trt.OnnxParser(network, logger).parse_from_file("x.onnx")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1)
    cast("RtxBuilderConfig", config).set_compute_capability(None, 0)
    made = builder.create_optimization_profile()
    made.set_shape("x", trt.Dims([1]), trt.Dims([1]), trt.Dims([1]))
    builder.build_serialized_network(network, config)
    if TYPE_CHECKING:
        from tensorrt import IProgressMonitor
    else:
        IProgressMonitor = trt.IProgressMonitor
    class Monitor(IProgressMonitor):
        def step_complete(self, phase_name: str, step: int) -> bool:
            return True
"""
WRONG = {
    "a method": ("create_network(", "make_network(", "attr-defined"),
    "a name of the module": ("trt.OnnxParser", "trt.Parser", "attr-defined"),
    "a member": ("WORKSPACE", "SCRATCH", "attr-defined"),
    "a type": ('"x.onnx"', 'b"x.onnx"', "arg-type"),
    "a shape": ('"x", trt.Dims([1])', '"x", (1,)', "arg-type"),
    "the order": ("(network, config)", "(config, network)", "arg-type"),
    "a name of TensorRT-RTX alone": ('cast("RtxBuilderConfig", config).', "config.", "attr-defined"),
    "what is called back": ("-> bool:\n            return True", "-> str:\n            return ''", "override"),
}


@installed
def test_mypy_refuses_wrong_calls_of_the_builder(tmp_path: Path) -> None:
    types = (REPOSITORY / "tmc_export/engine/_types.py").read_text("utf-8")
    (tmp_path / "types_of_tensorrt.py").write_text(types)  # a copy: mypy would read the whole room, which takes it a minute
    (tmp_path / "right.py").write_text(CALLER)
    for number, (old, new, _) in enumerate(WRONG.values()):
        assert CALLER.count(old) == 1
        (tmp_path / f"wrong{number}.py").write_text(CALLER.replace(old, new))
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    command = [sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml"), "--cache-dir", "cache", *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = {(file, kind) for file, kind in re.findall(r"^(\w+)\.py:\d+: error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)}
    assert found == {(f"wrong{number}", kind) for number, (_, _, kind) in enumerate(WRONG.values())}, done.stdout + done.stderr


@cache
def stub_names() -> set[str]:
    """The names of the stubs: classes and functions, and members of classes with their class."""
    names = set()
    for item in ast.parse(STUB.read_text("utf-8")).body:
        if isinstance(item, (ast.ClassDef, ast.FunctionDef)):
            names.add(item.name)
        for member in item.body if isinstance(item, ast.ClassDef) else ():
            target = member.target if isinstance(member, ast.AnnAssign) else None
            names.add(f"{item.name}.{target.id if isinstance(target, ast.Name) else getattr(member, 'name', '')}")
    return names


@cache
def looked_for() -> set[str]:
    """Last parts of names that the code looks for with `getattr` and `hasattr`, or that only `_types` declares."""
    found = set()
    for path in CALLERS:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") in ("getattr", "hasattr")
                and isinstance(node.args[1], ast.Constant)
            ):
                found.add(str(node.args[1].value))
    for item in ast.parse((REPOSITORY / "tmc_export/engine/_types.py").read_text("utf-8")).body:
        if isinstance(item, ast.ClassDef) and item.name.startswith("Rtx"):
            found |= {getattr(m, "name", None) or m.target.id for m in item.body if isinstance(m, (ast.FunctionDef, ast.AnnAssign))}
    return found


def has(module: object, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def wrong_rows(rows: tuple[Difference, ...]) -> list[str]:
    known, rtx = stub_names(), pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    wrong = [row.name for row in rows if row.stubs != (row.name in known) or row.rtx != has(rtx, row.name)]
    missing = looked_for() - {row.name.rpartition(".")[2] for row in rows}
    return wrong + sorted(missing)


@installed
def test_the_differences_are_those_of_code_stubs_and_tensorrt_rtx() -> None:
    assert wrong_rows(DIFFERENCES) == []


@installed
@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: row.name)
def test_a_wrong_or_missing_row_is_found(row: Difference) -> None:
    others = tuple(other for other in DIFFERENCES if other != row)
    assert wrong_rows((*others, replace(row, stubs=not row.stubs))) == [row.name]
    assert wrong_rows((*others, replace(row, rtx=not row.rtx))) == [row.name]
    if not row.stubs:
        assert wrong_rows(others) == [row.name.rpartition(".")[2]]


@installed
def test_tensorrt_rtx_has_every_name_that_both_shall_have() -> None:
    """The protocol is compared with the stubs by mypy; with TensorRT-RTX here."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the extra [rtx]")
    from tmc_export.engine import _types

    names = [name for name in vars(_types._Names) if not name.startswith("_")]
    assert len(names) > 10 and all(hasattr(rtx, name) for name in names)
    assert not hasattr(rtx, "NoSuchName")


def test_signatures_that_are_no_python_are_mended() -> None:
    text, count = tensorrt_stubs.mended("bool: DataType\nclass A:\n    def f(self, in: int) -> int: ...\n    def g(self) -> int: ...\n")
    assert (
        count == 2
        and text.startswith("\nclass")
        and "    def f(*args: typing.Any, **kwargs: typing.Any) -> int: ..." in text
        and "def g(self) -> int" in text
    )
    with pytest.raises(SyntaxError):
        tensorrt_stubs.mended("class A:\n    x: = 3\n")
