"""Which room of tmc-export may import which; reads every module with `ast` and lists what breaks the table.

    python tools/rooms.py

The table is ARCHITECTURE.md's. Imports inside functions and under `TYPE_CHECKING` count as well: a direction is a direction. Heavy
packages (torch and what builds on it) are told apart by place: some rooms may import them at the top of a module, most only inside a
function, and the rooms that run on the device or before a model is opened, never. `require("torch", ...)` and `import_module("torch")`
count as imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOMS", "Found", "Rule", "imports_of", "modules", "problems"]

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = frozenset({"accelerate", "optimum", "torch", "torchvision", "transformers"})
GRAPHS = frozenset({"huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "polygraphy", "safetensors"})
HEAVY = MODELS | GRAPHS | {"onnxruntime", "tensorrt", "tensorrt_rtx"}


@dataclass(frozen=True)
class Rule:
    """What one room may import.

    Attributes:
        rooms: other rooms; `*` is every room.
        top: heavy packages it may import at the top of a module.
        never: heavy packages it may not import even inside a function.
        light: the other packages it may import; None is any.
    """

    rooms: frozenset[str]
    top: frozenset[str] = frozenset()
    never: frozenset[str] = frozenset()
    light: frozenset[str] | None = None


def _rule(rooms: str, top: str = "", never: frozenset[str] = frozenset(), light: str | None = None) -> Rule:
    return Rule(frozenset(rooms.split()), frozenset(top.split()), never, None if light is None else frozenset(light.split()))


ROOMS = {
    "core": _rule("", never=HEAVY, light=""),
    "recipe": _rule("core", never=HEAVY, light="pydantic pydantic_core ruamel"),
    "families": _rule("core", light="numpy PIL"),
    "graphs": _rule("core", light="pydantic pydantic_core"),
    "plan": _rule("core recipe families graphs", never=MODELS, light="numpy pydantic"),
    "surgery": _rule("core plan families graphs", top="torch transformers"),
    "export": _rule("core", top="torch transformers onnx onnx_ir onnxscript safetensors ml_dtypes"),
    "passes": _rule("core export", top="onnx_ir onnxscript", never=MODELS),
    "quantize": _rule("core export passes plan runtime", top="onnx_ir onnxruntime"),
    "engine": _rule("core", never=MODELS),
    "bundle": _rule("core", never=MODELS | GRAPHS),
    "runtime": _rule("core bundle engine", top="onnxruntime", never=MODELS | GRAPHS, light="numpy PIL jinja2 tokenizers cuda"),
    "verify": _rule("*", top="torch transformers onnx onnx_ir"),
    "debug": _rule("core bundle runtime verify engine recipe api"),
    "report": _rule("*"),
    "api": _rule("*", top="torch transformers onnx onnx_ir"),  # its __init__ stays light: tests/test_packaging.py imports it and looks
    "commands": _rule("*", light="click rich numpy PIL psutil"),
    "cli": _rule("core commands", never=HEAVY, light="click"),
    "__init__": _rule("api", never=HEAVY, light=""),
}


@dataclass(frozen=True)
class Found:
    """One import: the dotted module, its line, and whether it runs when the file is imported."""

    module: str
    line: int
    top: bool


def _named(node: ast.AST) -> list[str]:
    """Return the modules that one node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            return ["." * node.level + (node.module or "")]
        if node.module == "tmc_export":
            return [f"tmc_export.{alias.name}" for alias in node.names]
        return [node.module or ""]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("require", "import_module", "__import__"):
            return [node.args[0].value]
    return []


def imports_of(tree: ast.AST, top: bool = True) -> Iterator[Found]:
    """Yield every import of a module, nested ones too; `if TYPE_CHECKING` and function bodies are not `top`."""
    for node in ast.iter_child_nodes(tree):
        for name in _named(node):
            yield Found(name, getattr(node, "lineno", 0), top)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                yield from imports_of(ast.Module([child], []), False)
            for child in node.orelse:
                yield from imports_of(ast.Module([child], []), top)
        else:
            yield from imports_of(node, top and not inside)


def modules(repository: Path) -> Iterator[tuple[str, Path]]:
    """Yield (room, file) for every module of the package; the top-level folders stand for their symlinks."""
    package = repository / "tmc_export"
    for path in sorted(package.iterdir()):
        real = repository / path.name if path.is_symlink() else path
        if real.is_dir():
            yield from ((path.name, file) for file in sorted(real.rglob("*.py")))
        elif real.suffix == ".py":
            yield path.stem, real


def _broken(room: str, found: Found) -> str | None:
    """Say why `room` may not import `found`; None when it may."""
    rule, parts = ROOMS[room], found.module.split(".")
    if found.module.startswith("."):
        return "relative import; write it in full"
    if parts[0] == "tmc_export":
        other = parts[1] if len(parts) > 1 else "__init__"
        if other in (room, "__init__", "__version__", "commands" if room == "cli" else room) or "*" in rule.rooms or other in rule.rooms:
            return None
        return f"room '{room}' may import {', '.join(sorted(rule.rooms)) or 'no other room'}; not '{other}'"
    if parts[0] in HEAVY:
        if parts[0] in rule.never:
            return f"room '{room}' never imports {parts[0]}"
        if found.top and parts[0] not in rule.top:
            return f"room '{room}' imports {parts[0]} only inside a function"
        return None
    if rule.light is not None and parts[0] not in rule.light and parts[0] not in sys.stdlib_module_names:
        return f"room '{room}' may import {', '.join(sorted(rule.light)) or 'the standard library only'}; not {parts[0]}"
    return None


def problems(repository: Path) -> tuple[int, list[str]]:
    """Return how many files were read and one line per import that breaks the table."""
    count, lines = 0, []
    for room, path in modules(repository):
        count += 1
        place = path.relative_to(repository)
        if room not in ROOMS:
            lines.append(f"{place}:1: '{room}' is no room; add it to tools/rooms.py and ARCHITECTURE.md")
            continue
        for found in imports_of(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if reason := _broken(room, found):
                lines.append(f"{place}:{found.line}: imports {found.module}: {reason}")
    return count, lines


if __name__ == "__main__":
    files, broken = problems(REPOSITORY)
    print("\n".join([*broken, f"{files} files, {len(broken)} imports against the table"]))
    sys.exit(1 if broken else 0)
