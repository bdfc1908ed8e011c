"""The trained model in the repository, float32 beside int4: how often the answers about the demo pictures agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_int4_answers_as_float32_does(repository: Path, tmp_path: Path) -> None:
    from tmc_export.api.bundling import build_bundle
    from tmc_export.runtime.session import load

    questions = json.loads((repository / "examples/pictures/questions.json").read_text("utf-8"))
    answers: dict[str, list[str]] = {}
    for name, accuracy in (("quickstart", 4), ("tiny-llava-fastv-int4", 1), ("tiny-llava-fastv-int4", 4)):
        folder = tmp_path / name
        if not folder.exists():
            build_bundle(repository / "recipes" / f"{name}.yaml", folder, record=False)
        session = load(folder, threads=1, int4_accuracy=accuracy)
        pictures = repository / "examples/pictures"
        answers[f"{name} {accuracy}"] = [session.generate([pictures / q["picture"]], q["question"]).text for q in questions]
    exact, level1, level4 = answers.values()
    right = [sum(a.strip() == q["answer"] for a, q in zip(found, questions, strict=True)) for found in answers.values()]
    agree = [sum(a == b for a, b in zip(exact, found, strict=True)) for found in (level1, level4)]
    print(f"right of {len(questions)}: {right}; agree with float32: {agree}")
    assert len(questions) >= 30
    # 4 bits lose 20 dB a linear; every tenth answer may turn, and no more, on a model of 128 channels
    assert all(a >= 0.9 * len(questions) for a in agree) and all(abs(r - right[0]) <= 3 for r in right)
