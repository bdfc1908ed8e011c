"""Make the tiny CLIP text tower of this folder: random weights and a tokenizer that spells.

python examples/tiny-clip/make.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests._tower import save_clip

if __name__ == "__main__":
    save_clip(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent, text_only=True)
