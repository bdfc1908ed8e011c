"""All ordered pairs of one method per site and kind of layout change: each is planned, or refused with line and reason, as written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.end_to_end._pairs import CONFIG, PAIRS, REFUSED, REPRESENTATIVES, share_a_site, write_pair
from tmc_export.core.errors import LegalityError
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.make import make_plan
from tmc_export.plan.source import read_model_files
from tmc_export.plan.types import Plan, StagePlan
from tmc_export.recipe import load_recipe

SITES = {"input", "encoder.1", "encoder.1.mid", "encoder", "projector.replace", "projector", "decoder.0", "decoder.2"}


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return read_model_files(CONFIG)


def stages(plan: Plan) -> list[StagePlan]:
    """All stages, in the order they run."""
    return [*(s for v in plan.vision for s in v.stages), *(s for c in plan.cuts for s in c.stages)]


def swapped(plan: Plan) -> Plan:
    """The plan with the numbers of two entries exchanged."""

    def swap(found: tuple[StagePlan, ...]) -> tuple[StagePlan, ...]:
        return tuple(replace(s, entry=1 - s.entry) for s in found)

    vision = tuple(replace(v, stages=swap(v.stages)) for v in plan.vision)
    return replace(plan, vision=vision, cuts=tuple(replace(c, stages=swap(c.stages)) for c in plan.cuts))


def test_every_site_has_a_representative_and_each_works_alone(files: ModelFiles, tmp_path: Path) -> None:
    seen: set[str] = set()
    for each in REPRESENTATIVES:
        plan, _ = make_plan(load_recipe(write_pair(tmp_path, each.name)), files)
        assert {str(s.stage.at) for s in stages(plan)} == set(each.sites.split()), each.name
        seen |= set(each.sites.split())
    assert seen >= SITES


@pytest.mark.parametrize("first", [r.name for r in REPRESENTATIVES])
def test_every_pair_is_planned_or_refused_as_written(first: str, files: ModelFiles, tmp_path: Path) -> None:
    wrong: list[str] = []
    for pair in (p for p in PAIRS if p[0] == first):
        refused = REFUSED.get(pair)
        path = write_pair(tmp_path, *pair)
        try:
            make_plan(load_recipe(path), files)
        except LegalityError as error:
            said = str(error)
            if refused is None:
                wrong.append(f"{pair} is to be built, and is refused: {said}")
            elif not said.startswith(f"{path}:{6 + refused[0]}:") or refused[1] not in said or ";" not in said:
                wrong.append(f"{pair} is to be refused at line {6 + refused[0]} with '{refused[1]}': {said}")
        else:
            wrong += [f"{pair} is to be refused with '{refused[1]}', and has a plan"] if refused is not None else []
    assert not wrong, "\n".join(wrong)


def test_where_two_entries_share_no_site_their_order_changes_nothing(files: ModelFiles, tmp_path: Path) -> None:
    apart = [(a, b) for a, b in PAIRS if not share_a_site(a, b) and (a, b) not in REFUSED]
    assert len(apart) > 80
    for a, b in apart:
        one, _ = make_plan(load_recipe(write_pair(tmp_path, a, b)), files)
        other, _ = make_plan(load_recipe(write_pair(tmp_path, b, a)), files)
        assert swapped(other) == one, (a, b)


def test_where_two_entries_share_no_site_they_are_refused_alike() -> None:
    for (a, b), (blamed, words) in REFUSED.items():
        if not share_a_site(a, b):
            assert REFUSED[b, a] == (1 - blamed, words), (a, b)


def test_the_order_matters_at_a_site() -> None:
    """The rule above would be empty if no order mattered."""
    differ = {frozenset((a, b)) for a, b in PAIRS if ((a, b) in REFUSED) != ((b, a) in REFUSED)}
    assert all(share_a_site(*pair) for pair in differ) and len(differ) >= 8
