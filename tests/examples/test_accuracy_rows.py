"""The rows of benchmarks/accuracy.py: every training-free image method has one, with the counts that its plan says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks._accuracy_rows import BUNDLES, NOT_HERE, PAIRS, SMALLER, Bundle, all_bundles, learned, plan_of, recipe_of
from benchmarks.accuracy import paired
from tmc_export.graphs import METHODS

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = {b.name: b for b in BUNDLES}


def counts(bundle: Bundle) -> list[int]:
    """Visual tokens before every decoder layer."""
    return [b.visual_tokens for b in plan_of(recipe_of(bundle)).blocks for _ in range(b.first, b.last)]


def methods(bundle: Bundle) -> set[str]:
    return {entry.method for entry in recipe_of(bundle).compress}


def test_every_training_free_image_method_has_a_row_or_a_reason() -> None:
    free = {name for name in METHODS if METHODS.get(name).training_free and METHODS.get(name).modality == "image"}
    with_rows = set().union(*(methods(b) for b in BUNDLES if b.recipe))
    assert free - with_rows == set(NOT_HERE)


def test_every_learned_image_method_is_listed() -> None:
    names = {name for name in METHODS if not METHODS.get(name).training_free and METHODS.get(name).modality == "image"}
    assert {method for method, _, _ in learned()} == names
    trained = {recipe for _, recipe, weights in learned() if weights == "trained"}
    assert {b.recipe for b in all_bundles() if b not in BUNDLES} == trained


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda b: b.name)
def test_a_row_has_the_tokens_of_its_plan(bundle: Bundle) -> None:
    assert counts(bundle)[-1] == bundle.tokens


@pytest.mark.parametrize("bundle", [b for b in BUNDLES if b.control], ids=lambda b: b.name)
def test_the_random_row_beside_a_method_leaves_as_many_tokens_at_the_same_places(bundle: Bundle) -> None:
    mine, other = counts(bundle), counts(ROWS[bundle.control])
    slack = 1 if bundle.name == "tome-48" else 0  # the nearest count that ToMe makes
    assert all(abs(a - b) <= slack for a, b in zip(mine, other, strict=True)), (mine, other)
    assert "random" in methods(ROWS[bundle.control])


@pytest.mark.parametrize("bundle", [b for b in BUNDLES if b.control], ids=lambda b: b.name)
def test_the_random_row_beside_a_method_numbers_positions_as_it_does(bundle: Bundle) -> None:
    rules = []
    for plan in (plan_of(recipe_of(bundle)), plan_of(recipe_of(ROWS[bundle.control]))):
        cuts = [cut for cut in plan.cuts if cut.visual_out != cut.visual_in]
        # in a first turn truncated positions are those of a new numbering
        rule = {"keep" if cut.positions == "keep" else "renumber" for cut in cuts}
        rules.append(rule | ({"renumber"} if plan.vision[0].tokens < 196 else set()))
    assert rules[0] == rules[1]


def test_names_are_distinct_and_referred_to_rightly() -> None:
    assert len(ROWS) == len(BUNDLES)
    assert {b.control for b in BUNDLES if b.control} | set(SMALLER) | {name for pair in PAIRS for name in pair} <= set(ROWS)


def test_differences_are_of_pairs() -> None:
    assert paired([True, False], [True, False])[0] == 0.0
    difference, low, high = paired([True] * 9 + [False], [False] * 10)
    assert difference == 0.9 and low < difference < high


def test_planning_the_rows_imports_no_torch() -> None:
    import subprocess

    code = "import sys; from benchmarks._accuracy_rows import BUNDLES, plan_of, recipe_of; plan_of(recipe_of(BUNDLES[1])); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
