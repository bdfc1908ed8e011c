"""Mangled files (seeded): whatever is done to the text, the answer is a recipe or one RecipeError that names the file."""

from __future__ import annotations

import random
from pathlib import Path

from tmc_export.core.errors import RecipeError
from tmc_export.recipe import load_device, load_recipe

ROOT = Path(__file__).resolve().parents[2]
PIECES = [
    "[",
    "]",
    "{",
    "}",
    ":",
    " ",
    "\n",
    "- ",
    "!",
    "&a ",
    "*a",
    "'",
    '"',
    "#",
    "|",
    ">",
    "%",
    "@",
    "\t",
    "\0",
    "\u2028",
    "null",
    "1e999",
]
PIECES += ["0o9", "<<", "? ", ".inf", "---\n", "...\n", "%YAML 1.1\n", "2024-01-01", "\\", "-1", "~", "!!int ", "!!str ", "!!set "]


def mangled(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        text = text[:at] + (rng.choice(PIECES) + text[at:] if rng.random() < 0.6 else text[at + rng.randint(1, 8) :])
    return text


def test_mangled_files_end_in_a_recipe_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    sources = [(load_recipe, file.read_text(encoding="utf-8")) for file in sorted((ROOT / "recipes").glob("*.yaml"))]
    devices = [(load_device, file.read_text(encoding="utf-8")) for file in sorted((ROOT / "devices").glob("*.yaml"))]
    file, refused = tmp_path / "mangled.yaml", 0
    for _ in range(300):
        load, text = rng.choice([*sources, *devices])
        file.write_text(mangled(text, rng), encoding="utf-8")
        try:
            load(file)
        except RecipeError as error:
            refused += 1
            assert all(line.startswith(f"{file}:") for line in str(error).splitlines()), str(error)
    assert refused > 150  # most manglings matter; if none were refused this test would show nothing
