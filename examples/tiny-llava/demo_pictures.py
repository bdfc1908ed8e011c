"""Writes the demo's pictures and questions: six scenes with held-out digits, taken as they come.

python demo_pictures.py --out ../pictures
"""

import argparse
import json
from pathlib import Path

from scenes import scene

__all__ = ["FIRST_SEED", "PICTURES", "write"]

FIRST_SEED = 9000
PICTURES = 6


def write(folder: Path) -> None:
    """Writes scene-1.png … and questions.json; "describe" is left out, the model did not learn it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(PICTURES):
        drawn = scene(FIRST_SEED + number, "heldout")
        name = f"scene-{number + 1}.png"
        drawn.image.save(folder / name, optimize=True)
        rows += [
            {"picture": name, "kind": question.kind, "question": question.text, "answer": question.answer}
            for question in drawn.questions
            if question.kind != "describe"
        ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    (folder / "questions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out)
