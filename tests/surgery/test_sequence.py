"""Places, origins and the assembled sequence behind a cut, against plain lists, for every pattern of kept and synthetic tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from tmc_export.graphs._contract import Compressed
from tmc_export.surgery.sequence import SYNTHETIC, Candidates, arriving, assemble, leave

TEXT, S = 0, 20


def plain(group: list[int], sources: dict[int, list[int]]) -> list[tuple[int, int, int]]:
    """(place, origin, index among the picture's candidates or -2 or -1 for text) of every token behind a cut, in order."""
    out = [(i, i, -1) for i, g in enumerate(group) if g == TEXT]
    for picture, listed in sources.items():
        mine = [i for i, g in enumerate(group) if g == picture]
        listed = listed[: len(mine)]
        for j, source in enumerate(listed):
            latest = len(mine) - len(listed) + j
            place = latest if source < 0 else min(source, latest)
            out.append((mine[place], mine[-1] if source < 0 else mine[source], SYNTHETIC if source < 0 else source))
    return sorted(out)


def run(group: list[int], sources: dict[int, list[int]], each: int, size: int, images: int = 2) -> list[tuple[int, int, int]]:
    """The same by `leave` and `assemble`; pictures that are missing or short are padded to the bucket of `each` candidates."""
    hidden = torch.arange(S, dtype=torch.float32)[None, :, None] + 0.5
    places, alive = torch.zeros(images, each, dtype=torch.int64), torch.zeros(images, each, dtype=torch.bool)
    kept = max(len(s) for s in sources.values())
    source, valid = torch.zeros(images, kept, dtype=torch.int64), torch.zeros(images, kept, dtype=torch.bool)
    for picture, listed in sources.items():
        mine = [i for i, g in enumerate(group) if g == picture]
        places[picture - 1, : len(mine)], alive[picture - 1, : len(mine)] = torch.tensor(mine), True
        source[picture - 1, : len(listed)], valid[picture - 1, : len(listed)] = torch.tensor(listed), True
    before = arriving(hidden, places.reshape(1, -1), alive.reshape(1, -1))
    made = 100.0 + torch.arange(images * kept, dtype=torch.float32).reshape(images, kept, 1)
    after = leave(before, Compressed(made, source, valid), images)
    text = torch.tensor([[i < len(group) and group[i] == TEXT for i in range(S)]])
    tokens, origin, place, there = assemble(hidden, text, after, size)
    count = int(there.sum())
    assert there[0, :count].all() and not tokens[0, count:].any()
    report = after.report().reshape(images, kept)
    index = {}
    for row in range(images * kept):
        if after.alive[0, row]:
            entry = int(report.flatten()[row])
            index[int(after.place[0, row])] = (entry if entry < 0 else entry - (row // kept) * each, float(made.flatten()[row]))
    found = []
    for n in range(count):
        at = int(place[0, n])
        number, value = index.get(at, (-1, at + 0.5))
        assert float(tokens[0, n, 0]) == value, "the token's own value, or the text's"
        found.append((at, int(origin[0, n]), number))
    return found


ONE = [0, 0, 1, 1, 1, 1, 1, 0, 0]
TWO = [0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0]


def test_every_pattern_of_one_picture() -> None:
    """All ascending choices of five candidates, with every number of synthetic tokens that leaves no more than arrived."""
    seen = 0
    for kept in range(6):
        for chosen in itertools.combinations(range(5), kept):
            for made in range(6 - kept):
                listed = [*chosen, *[-1] * made]
                if not listed:
                    continue
                wanted = plain(ONE, {1: listed})
                assert len({p for p, _, _ in wanted}) == len(wanted), "places are distinct"
                assert run(ONE, {1: listed}, each=5, size=S) == wanted
                seen += 1
    assert seen == 111


@pytest.mark.parametrize(
    "sources",
    [
        {1: [0, 2, -1], 2: [1, 3, -1]},
        {1: [2, 3, -1, -1], 2: [-1, -1, -1, -1]},
        {1: [3, -1], 2: [0, -1]},
        {1: [0, 1]},
        {2: [0, 3, -1]},
    ],
)
def test_two_pictures_and_missing_ones(sources: dict[int, list[int]]) -> None:
    group = [g if g in (0, *sources) else -1 for g in TWO]
    group = [g for g in group if g >= 0]
    assert run(group, sources, each=6, size=14) == plain(group, sources)


def test_a_token_moves_only_where_there_is_no_room_behind_it() -> None:
    assert plain(ONE, {1: [0, 2, -1]})[2:5] == [(2, 2, 0), (4, 4, 2), (6, 6, -2)]
    assert [p for p, _, _ in run(ONE, {1: [0, 4, -1]}, 5, S)] == [0, 1, 2, 5, 6, 7, 8], "4 makes room"


def test_more_tokens_than_places_are_dropped() -> None:
    """A short picture of a larger bucket: three candidates cannot leave four tokens."""
    group = [0, 1, 1, 1, 0]
    assert run(group, {1: [0, 2, -1, -1]}, each=6, size=S) == plain(group, {1: [0, 2, -1, -1]})
    assert len(plain(group, {1: [0, 2, -1, -1]})) == 5


def test_the_second_stage_of_a_cut_counts_on_what_the_first_left() -> None:
    """A synthetic token that is kept again stays one; its origin stays the last candidate."""
    hidden = torch.zeros(1, S, 1)
    places = torch.tensor([[3, 4, 5, 6, 7]])
    first = leave(
        arriving(hidden, places, torch.ones(1, 5, dtype=torch.bool)),
        Compressed(torch.zeros(1, 4, 1), torch.tensor([[0, 1, 4, -1]]), torch.ones(1, 4, dtype=torch.bool)),
        1,
    )
    assert first.place.tolist() == [[3, 4, 6, 7]] and first.origin.tolist() == [[3, 4, 7, 7]]
    second = leave(first, Compressed(torch.zeros(1, 3, 1), torch.tensor([[1, 3, -1]]), torch.ones(1, 3, dtype=torch.bool)), 1)
    assert second.report().tolist() == [[1, SYNTHETIC, SYNTHETIC]]
    assert second.place.tolist() == [[4, 6, 7]] and second.origin.tolist() == [[4, 7, 7]]


def test_without_visual_tokens_the_text_is_left() -> None:
    text = torch.tensor([[True, False, False, True, False]])
    hidden = torch.arange(5.0)[None, :, None]
    tokens, origin, place, there = assemble(hidden, text, None, 3)
    assert tokens[0, :, 0].tolist() == [0.0, 3.0, 0.0] and there.tolist() == [[True, True, False]]
    assert origin[0, :2].tolist() == place[0, :2].tolist() == [0, 3]


def test_the_comparison_can_fail() -> None:
    left = leave(
        arriving(torch.zeros(1, S, 1), torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.bool)),
        Compressed(torch.zeros(1, 2, 1), torch.tensor([[2, -1]]), torch.ones(1, 2, dtype=torch.bool)),
        1,
    )
    assert isinstance(left, Candidates) and left.place.tolist() == [[4, 5]] != [[5, 5]]
