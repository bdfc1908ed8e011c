"""Every family at reduced width and depth: bundle = reference, token for token and logits at every step; uncompressed = `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("skimage")

from tests.end_to_end._generate import compare_with_generate  # noqa: E402
from tests.end_to_end._proof import build, prove  # noqa: E402
from tests.end_to_end._small import SMALL, asked, scripts  # noqa: E402

pytestmark = pytest.mark.slow
CASES = [(model, plan) for model, small in SMALL.items() for plan in small.compress]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small_models")


@pytest.mark.parametrize(("model", "plan"), CASES)
def test_small_model(model: str, plan: str, folder: Path) -> None:
    small = SMALL[model]
    if not (source := folder / model).is_dir():
        small.save(source)
    built = build(folder, f"{model}-{plan}", source, small.compress[plan], small.inputs)
    proof, cases = prove(built, scripts(built), steps=24)
    print(proof.row(), *proof.near_ties, *proof.exceptions, sep="\n")
    assert not proof.failures, "\n".join(proof.failures[:5])
    assert proof.distinct >= 16
    assert len(proof.exceptions) <= 1 and proof.free_turns - proof.free <= len(proof.exceptions) + len(proof.near_ties)
    if len(built.plan.vision) > 1:
        assert {b for c in cases for t in c.turns for b in t.buckets} == {0, 1}, "both photograph sizes"
    if plan == "uncompressed":
        checks = list(compare_with_generate(built.load(), source, asked(built), steps=24))
        assert len(checks) == 9
        assert not [f"{c.name}: {c.note}" for c in checks if not c.passed]
