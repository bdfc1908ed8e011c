"""Prove the package: sdist, wheel from the sdist, exact contents, and a bare environment that runs it.

    python tools/check_packaging.py [--skip-310]

Every step prints one line; the first thing that is wrong ends the script with code 1. The Python 3.10 half runs where such an interpreter
is found: `TMC_PYTHON310`, a `python3.10` on PATH that runs, or pyenv's; otherwise it says *not run*. With `TMC_BUNDLE` set to a bundle's
folder, that bundle is verified in both environments.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["expected_sdist", "expected_wheel", "main", "python310", "run_bundle"]

REPOSITORY = Path(__file__).resolve().parents[1]
OUTSIDE = ("graphs", "recipes", "devices", "cli.py")  # real at the top level, symlinks in tmc_export
BUILD_ONLY = ("surgery", "export", "passes", "quantize", "verify", "api")  # rooms that may import the export extra
ON_DEVICE = ("core", "recipe", "bundle", "runtime", "cli", "commands")  # what Python 3.10 must run
HELP_LIMIT_S = 0.3
OLDEST = "onnxruntime==1.23.2"

_IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
names = ["tmc_export"]
for room in sys.argv[1].split(","):
    module = importlib.import_module(f"tmc_export.{room}")
    names.append(module.__name__)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}."):
        importlib.import_module(found.name)
        names.append(found.name)
if importlib.util.find_spec("tmc_export.api"):
    importlib.import_module("tmc_export.api")
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript"} & set(sys.modules)
assert not heavy, f"importing the runtime brought {sorted(heavy)}"
assert importlib.util.find_spec("torch") is None, "this environment is not bare: torch is installed"
print(len(names))
"""


class CheckError(Exception):
    """The package is not what it should be."""


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its stdout; raises `CheckError` with its output when it fails."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckError(f"{' '.join(map(str, command))[:300]} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def tracked() -> list[str]:
    """Return the files that git tracks and that are there, symlinks included."""
    listed = run("git", "ls-files", "-z", cwd=REPOSITORY).split("\0")
    return [name for name in listed if name and os.path.lexists(REPOSITORY / name)]


def _links() -> set[str]:
    return {f"tmc_export/{name}" for name in OUTSIDE}


def expected_wheel(files: Iterable[str]) -> set[str]:
    """Return the wheel's files, its metadata aside, that belong to these tracked files.

    >>> sorted(expected_wheel(["cli.py", "graphs/fastv.py", "tmc_export/graphs", "tmc_export/core/errors.py", "tests/test_x.py"]))
    ['tmc_export/cli.py', 'tmc_export/core/errors.py', 'tmc_export/graphs/fastv.py']
    """
    inside = {name for name in files if name.startswith("tmc_export/")} - _links()
    return inside | {f"tmc_export/{name}" for name in files if name.split("/")[0] in OUTSIDE}


def expected_sdist(files: Iterable[str]) -> set[str]:
    """Return the sdist's files, below its one folder: everything tracked but the four symlinks, and the metadata.

    >>> sorted(expected_sdist(["cli.py", "tmc_export/cli.py", ".ci/run"]))
    ['.ci/run', 'PKG-INFO', 'cli.py']
    """
    return (set(files) - _links()) | {"PKG-INFO"}


def rooms_of(files: Iterable[str]) -> set[str]:
    """Return the rooms that have modules among these files of a wheel.

    >>> sorted(rooms_of(["tmc_export/cli.py", "tmc_export/__init__.py", "tmc_export/recipes/x.yaml", "tmc_export/core/errors.py"]))
    ['cli', 'core']
    """
    return {name.split("/")[1].removesuffix(".py") for name in files if name.endswith(".py")} - {"__init__"}


def same(what: str, got: set[str], wanted: set[str]) -> None:
    """Raise `CheckError` unless both sets are equal; names what is missing and what is too much."""
    if got != wanted:
        raise CheckError(f"{what}: missing {sorted(wanted - got)[:20]}, not expected {sorted(got - wanted)[:20]}")
    print(f"{what}: {len(got)} files, exactly the tracked ones")


def build(folder: Path) -> Path:
    """Build the sdist from the tracked files, and the wheel from that sdist; check both; return the wheel."""
    source, files = folder / "source", tracked()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", source)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if not member.isdir()}
    same(f"sdist ({sdist.stat().st_size / 1e6:.1f} MB)", names, expected_sdist(files))
    with zipfile.ZipFile(wheel) as package:
        names = {name for name in package.namelist() if ".dist-info/" not in name}
    same(f"wheel from the sdist ({wheel.stat().st_size / 1e6:.1f} MB)", names, expected_wheel(files))
    return wheel


def environment(python: str, folder: Path, packages: Sequence[str | Path]) -> Path:
    """Make a virtual environment with `packages` only; return its python."""
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "install", "-q", *packages)
    return inside


def import_rooms(python: Path, folder: Path, rooms: Iterable[str]) -> None:
    """Import every module of these rooms in `python`, which has neither torch nor transformers."""
    count = run(python, "-I", "-c", _IMPORT_ALL, ",".join(rooms), cwd=folder).strip()
    print(f"imports: {count} modules without torch, transformers or onnx ({run(python, '-V').strip()})")


def time_help(python: Path, folder: Path) -> None:
    """Time `tmc-export --help`; raises `CheckError` when the median of five is above the limit."""
    command, seconds = python.with_name("tmc-export"), []
    text = run(command, "--help", cwd=folder)
    for _ in range(5):
        start = time.perf_counter()
        run(command, "--help", cwd=folder)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    if "Commands:" not in text:
        raise CheckError(f"tmc-export --help lists no commands:\n{text}")
    print(f"tmc-export --help: {median:.3f} s (median of 5, from {min(seconds):.3f} to {max(seconds):.3f})")
    if median > HELP_LIMIT_S:
        raise CheckError(f"tmc-export --help took {median:.3f} s, the limit is {HELP_LIMIT_S} s; a verb imports too much at module level")


def run_bundle(python: Path, bundle: str | None) -> bool:
    """Verify a bundle in `python` through its recorded reference outputs; say *not run* when there is none."""
    if not bundle:
        print("bundle: not run (set TMC_BUNDLE to a bundle's folder)")
        return False
    run(python.with_name("tmc-export"), "verify", Path(bundle).resolve())
    print(f"bundle: {Path(bundle).name} verified ({run(python, '-V').strip()})")
    return True


def python310() -> str | None:
    """Find a Python 3.10 that runs."""
    candidates = [os.environ.get("TMC_PYTHON310"), shutil.which("python3.10")]
    if pyenv := shutil.which("pyenv"):
        versions = subprocess.run([pyenv, "whence", "python3.10"], capture_output=True, text=True, check=False).stdout.split()
        roots = [subprocess.run([pyenv, "prefix", v], capture_output=True, text=True, check=False).stdout.strip() for v in versions]
        candidates += [f"{root}/bin/python3.10" for root in reversed(roots) if root]
    for candidate in filter(None, candidates):
        try:
            done = subprocess.run([candidate, "-V"], capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.startswith("Python 3.10."):
            return candidate
    return None


def check(folder: Path, skip_310: bool) -> None:
    """Run every step in `folder`."""
    bundle, wheel = os.environ.get("TMC_BUNDLE"), build(folder)
    bare = environment(sys.executable, folder / "bare", [wheel])
    import_rooms(bare, folder, sorted(rooms_of(expected_wheel(tracked())) - set(BUILD_ONLY)))
    time_help(bare, folder)
    run_bundle(bare, bundle)
    old = None if skip_310 else python310()
    if old is None:
        print(f"Python 3.10 with {OLDEST}: not run ({'--skip-310' if skip_310 else 'no Python 3.10 found; set TMC_PYTHON310'})")
        return
    oldest = environment(old, folder / "python310", [wheel, OLDEST])
    version = run(oldest, "-c", "import onnxruntime; print(onnxruntime.__version__)").strip()
    if version != OLDEST.split("==")[1]:
        raise CheckError(f"Python 3.10 has onnxruntime {version}, wanted {OLDEST}")
    print(f"Python 3.10: onnxruntime {version}")
    import_rooms(oldest, folder, sorted(rooms_of(expected_wheel(tracked())) & set(ON_DEVICE)))
    run_bundle(oldest, bundle)


def main() -> int:
    """Run the check in a temporary folder; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-310", action="store_true", help="leave the Python 3.10 half out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tmc-packaging-") as folder:
        try:
            check(Path(folder), options.skip_310)
        except CheckError as error:
            print(f"packaging: {error}", file=sys.stderr)
            return 1
    print("packaging: passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
