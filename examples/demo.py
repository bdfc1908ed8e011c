"""The quickstart: build a small LLaVA twice, with and without visual-token compression, and ask both about pictures.

Run it with `make demo`, or `python examples/demo.py` where the project is installed with its extra `export`.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import tmc_export

if TYPE_CHECKING:
    from tmc_export.runtime.session import Answer, Session

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "examples" / "pictures"
RECIPES = {"uncompressed": ROOT / "recipes" / "quickstart-uncompressed.yaml", "fastv 50%": ROOT / "recipes" / "quickstart.yaml"}
OUTPUTS = {"uncompressed": ROOT / "out" / "quickstart-uncompressed", "fastv 50%": ROOT / "out" / "quickstart"}


def main() -> None:
    """Build, ask, compare, and say what was proved."""
    sessions: dict[str, Session] = {}
    for name, recipe in RECIPES.items():
        began = time.perf_counter()
        built = tmc_export.build(recipe, OUTPUTS[name], progress=lambda line: print(f"  {line}", flush=True))
        state = "up to date" if built.cached else f"built in {time.perf_counter() - began:.0f} s"
        print(f"{name}: {built.folder.relative_to(ROOT)} {state}", flush=True)
        sessions[name] = tmc_export.load(built.folder, threads=1)
        sessions[name].generate([PICTURES / "scene-1.png"], "what is at a1")  # the first answer also warms caches
    asked = json.loads((PICTURES / "questions.json").read_text("utf-8"))
    answers: dict[str, list[Answer]] = {name: [] for name in sessions}
    for item in asked:  # alternated, so that both meet the same machine
        for name, session in sessions.items():
            answers[name].append(session.generate([PICTURES / item["picture"]], item["question"]))
    show_answers(asked, answers)
    show_figures(asked, answers, sessions)
    for name, session in sessions.items():
        print(f"\nWhat was proved of '{name}':")
        for rung, outcome in session.manifest.proofs.items():
            print(f"  {rung}: {outcome}")


def show_answers(asked: list[dict[str, str]], answers: dict[str, list[Answer]]) -> None:
    """One line per question: the truth and both answers, a mark where one is wrong."""
    print(f"\n{'picture':<12} {'question':<28} {'truth':<16}" + "".join(f"{name:<18}" for name in answers))
    for index, item in enumerate(asked):
        cells = [answers[name][index].text.strip() for name in answers]
        marked = [cell if cell == item["answer"] else f"{cell} (x)" for cell in cells]
        print(f"{item['picture']:<12} {item['question']:<28} {item['answer']:<16}" + "".join(f"{cell:<18}" for cell in marked))


def show_figures(asked: list[dict[str, str]], answers: dict[str, list[Answer]], sessions: dict[str, Session]) -> None:
    """Right answers, tokens, times and size of each bundle."""
    print(f"\n{'':<14} {'right':>7} {'visual tokens':>15} {'first token':>13} {'per token':>11} {'graphs':>9}")
    for name, given in answers.items():
        right = sum(a.text.strip() == item["answer"] for a, item in zip(given, asked, strict=True))
        first = statistics.median(a.timings.first_token_ms for a in given)
        later = statistics.median(a.timings.token_ms for a in given if a.timings.token_ms)
        size = sum(e.size for n, e in sessions[name].manifest.files.items() if n.startswith("onnx/"))
        visual = " -> ".join(str(n) for n in given[0].visual_tokens)
        print(f"{name:<14} {right:>4}/{len(asked)} {visual:>15} {first:>10.1f} ms {later:>8.2f} ms {size / 1e6:>6.1f} MB")
    print("Times: this machine's CPU, one thread, medians. The model is tiny: its encoder takes most of the first token.")


if __name__ == "__main__":
    main()
