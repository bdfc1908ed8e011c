"""The shipped small LLaVA, every shipped plan: bundle = reference, token for token and logits at every step; uncompressed = `generate`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.end_to_end._generate import compare_with_generate  # noqa: E402
from tests.end_to_end._proof import TABLE, Built, Proof, bucket_differences, build, first_kept, prove, reference_cases  # noqa: E402
from tests.end_to_end._tiny import COMPRESS, MODEL, SELECTING, asked, conversations, pairs  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.bundle.write import seal  # noqa: E402
from tmc_export.verify.play import play  # noqa: E402
from tmc_export.verify.recorded import Case  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end_to_end")


@pytest.fixture(scope="module")
def fastv(folder: Path) -> Built:
    return build(folder, "fastv", MODEL, COMPRESS["fastv"])


@pytest.fixture(scope="module")
def cases(fastv: Built) -> list[Case]:
    """One question at each of three prompt lengths, in front of the picture and behind it."""
    return reference_cases(fastv, pairs(6), 4)


def check(proof: Proof) -> None:
    """Nothing failed, everything was looked at, and ties are rare."""
    assert not proof.failures, "\n".join(proof.failures[:5])
    assert proof.steps and proof.pairs
    assert len(proof.exceptions) <= 0.02 * max(proof.kept, 50), proof.exceptions
    assert proof.free_turns - proof.free <= len(proof.exceptions) + len(proof.near_ties)


def test_fastv_is_the_reference_on_few_pairs(fastv: Built) -> None:
    proof, _ = prove(fastv, pairs(6), steps=4)
    check(proof)
    assert (proof.pairs, proof.free, proof.steps, proof.kept) == (6, 6, 48, 12)


def test_a_perturbed_weight_is_found(fastv: Built, cases: list[Case], tmp_path: Path) -> None:
    other = tmp_path / "perturbed"
    shutil.copytree(fastv.folder, other)
    path = other / "onnx" / "block_1.data"
    weights = np.fromfile(path, np.float32)
    weights[weights.size // 2 :][:128] += 0.05  # one row of a matrix of the second block
    weights.tofile(path)
    seal(other, open_manifest(fastv.folder))
    session = Built(fastv.model, fastv.recipe, other, fastv.plan).load()
    checks = play(session, cases, TABLE, "float32")
    assert {c.name for c in checks if not c.passed} == {f"{c.name}/turn 1/logits" for c in cases}


def test_another_kept_token_is_found(fastv: Built, cases: list[Case]) -> None:
    from dataclasses import replace

    turn = cases[0].turns[0]
    (stage,) = turn.expected.stages
    moved = stage.kept.copy()
    moved[-1] = max(set(range(196)) - set(stage.kept.tolist()))
    wrong = replace(turn, expected=replace(turn.expected, stages=(replace(stage, kept=np.sort(moved)),)))
    checks = play(fastv.load(), [Case("moved", (wrong,))], TABLE, "float32")
    assert [c.name for c in checks if not c.passed] == ["moved/turn 1/fastv at decoder.2"]


def test_kept_tokens_do_not_depend_on_the_route_or_on_old_slots(fastv: Built, cases: list[Case]) -> None:
    fresh, used = fastv.load(), fastv.load()
    for case in cases[:3]:
        whole = first_kept(fresh, case.turns[0], "whole")
        assert whole and first_kept(fresh, case.turns[0], "chunked") == whole
    wanted = first_kept(fastv.load(), cases[0].turns[0])
    first_kept(used, cases[-1].turns[0])
    for _ in range(8):
        used.decoder.step(9)
    assert first_kept(used, cases[0].turns[0]) == wanted, "slots of an earlier conversation were seen"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESS)
def test_every_plan_on_fifty_pairs(name: str, folder: Path) -> None:
    built = build(folder, f"{name}-50", MODEL, COMPRESS[name])
    proof, _ = prove(built, pairs(50), steps=8, routes=("whole", "chunked"))
    print(proof.row())
    check(proof)
    assert proof.pairs == 50 and proof.lengths >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPRESS)
def test_every_plan_with_two_pictures_and_later_turns(name: str, folder: Path) -> None:
    built = build(folder, f"{name}-two", MODEL, COMPRESS[name], {"images": 2, "text_tokens": 64})
    proof, _ = prove(built, conversations(), steps=8)
    print(proof.row())
    check(proof)


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTING)
def test_kept_tokens_do_not_change_with_the_bucket(name: str, folder: Path) -> None:
    small = build(folder, f"{name}-32", MODEL, COMPRESS[name], {"text_tokens": 32})
    large = build(folder, f"{name}-96", MODEL, COMPRESS[name], {"text_tokens": 96, "chunk": 48})
    wrong, ties = bucket_differences(small, large, pairs(20))
    assert not wrong and len(ties) <= 1


@pytest.mark.slow
def test_uncompressed_is_hugging_face_generate(folder: Path) -> None:
    checks = list(compare_with_generate(build(folder, "generate", MODEL).load(), MODEL, asked(50), steps=8))
    assert len(checks) == 150
    assert not [f"{c.name}: {c.note}" for c in checks if not c.passed]
