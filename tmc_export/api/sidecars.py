"""Hugging Face's text files that a bundle carries as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["SIDECARS", "copy_sidecars"]

SIDECARS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "generation_config.json", "config.json", "vocab.json", "merges.txt",
)  # fmt: skip
"""They lie under `model/` and, of text towers, `towers/<n>/`."""


def copy_sidecars(folder: Path, out: Path) -> None:
    """Copy those that a model folder has into a new folder."""
    out.mkdir(parents=True)
    for name in SIDECARS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
