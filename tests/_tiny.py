"""The smallest complete bundle, for tests that need one to damage, and the real command line in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

__all__ = ["RECIPE", "TEXT_ONLY", "Ran", "listing", "save_tiny_model", "tmc", "write_recipe"]

RECIPE = """\
recipe: 1
name: tiny
model: {source: ./model, dtype: float32}
inputs: {images: 1, text_tokens: 32, new_tokens: 16, chunk: 8}
compress:
  - {at: decoder.1, method: fastv, keep: 4}
quantize: {}
target: {device: cpu, runtime: onnxruntime}
"""
"""2 decoder layers, 9 visual tokens, 4 of them kept."""

TEXT_ONLY = RECIPE.replace("images: 1", "images: 0").replace("compress:\n  - {at: decoder.1, method: fastv, keep: 4}", "compress: []")
"""One block, no picture: what builds fastest."""


@dataclass(frozen=True)
class Ran:
    """What the command line did: exit code, and what it printed."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Return the one error line; fail when there is another number of them, or a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.err.rstrip().endswith(lines[0]), self.err
        assert "Traceback" not in self.err + self.out
        assert len(lines[0]) < 600, lines[0]
        return lines[0]


def tmc(*args: object) -> Ran:
    """Run `tmc-export ARGS` in this process; an exception that the command line lets through fails the test."""
    from tmc_export.cli import main

    result = CliRunner().invoke(main, [str(a) for a in args], prog_name="tmc-export")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def save_tiny_model(folder: Path) -> Path:
    """Write a LLaVA of two decoder layers."""
    from tests.families._small import save_small_llava

    return save_small_llava(folder, layers=2, vision_layers=2, hidden=32, image_size=42)


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """Write a recipe that names the model `./model`."""
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Path → size and time of change of everything in a folder."""
    return {p.relative_to(folder).as_posix(): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*"))}
