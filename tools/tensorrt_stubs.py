"""Installs the types of TensorRT for mypy: `python tools/tensorrt_stubs.py`. `make setup` runs it; it does nothing a second time.

`tensorrt-stubs` cannot be asked for in an extra: it requires TensorRT itself and its CUDA libraries, has no `py.typed`, five signatures of
it are no Python (`in` as an argument's name; an argument without a default behind ones with), and its own variable `bool` hides the type
of that name. So the pinned wheel is fetched alone, those signatures become `(*args, **kwargs)`, the variable is left out, and the `.pyi`
files are put beside the interpreter's packages as `tensorrt-stubs` and `tensorrt_bindings-stubs`: type checkers look there, and
`import tensorrt` does not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

__all__ = ["SHA256", "VERSION", "install", "mended", "place"]

VERSION = "10.13.0.35.1"
SHA256 = "749a36a1f825db0800a82d0dabbf7ef49f3a9edc1e794c9545fb94a551613fea"
_PACKAGES = ("tensorrt", "tensorrt_bindings")
_BROKEN = 8
"""Lines that are mended in this version; another number means that another file was read."""


def place() -> Path:
    """Return the folder whose packages this interpreter imports."""
    return Path(sysconfig.get_path("purelib"))


def mended(source: str) -> tuple[str, int]:
    """Return a stub that Python can parse, and how many lines were replaced.

    >>> text, replaced = mended("class A:\\n    def f(self, in: int) -> None: ...\\n")
    >>> print(text, replaced)
    class A:
        def f(*args: typing.Any, **kwargs: typing.Any) -> None: ...
     1

    Raises:
        SyntaxError: the line at fault is no signature on one line.
    """
    lines = ["" if line.startswith("bool: ") else line for line in source.split("\n")]
    count = sum(line.startswith("bool: ") for line in source.split("\n"))
    while True:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            line = lines[(error.lineno or 1) - 1]
            head, opened, rest = line.partition("(")
            closed = rest.rpartition(") ->")
            if not head.strip().startswith("def ") or not opened or not closed[1] or "**kwargs" in rest:
                raise
            lines[(error.lineno or 1) - 1] = f"{head}(*args: typing.Any, **kwargs: typing.Any) ->{closed[2]}"
            count += 1
        else:
            return "\n".join(lines), count


def install(wheel: Path, target: Path) -> int:
    """Write the stubs of a wheel into a folder of packages; returns how many lines were mended."""
    total = 0
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            package, _, rest = name.partition("/")
            if package not in _PACKAGES or not rest.endswith(".pyi"):
                continue
            text, count = mended(archive.read(name).decode("utf-8"))
            path = target / f"{package}-stubs" / rest
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            total += count
    return total


def main() -> None:
    """Fetch the wheel, check it and install it."""
    mark = place() / "tensorrt-stubs" / f"{VERSION}.txt"
    if mark.is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"tensorrt-stubs=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", folder, "-r", str(wanted)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"tensorrt-stubs {VERSION} cannot be fetched by: {' '.join(command)}; check the network and pip's index")
        (wheel,) = Path(folder).glob("*.whl")
        count = install(wheel, place())
    if count != _BROKEN:
        raise SystemExit(f"tensorrt-stubs {VERSION}: {count} lines were mended, {_BROKEN} were expected; read {place()}/tensorrt-stubs")
    mark.write_text("installed by tools/tensorrt_stubs.py\n", encoding="utf-8")
    print(f"types of TensorRT {VERSION}: {place()}/tensorrt-stubs")


if __name__ == "__main__":
    main()
