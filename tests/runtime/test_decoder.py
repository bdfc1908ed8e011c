"""The decoder's bookkeeping (routes, padding, cuts, compaction, renumbering, slots) against plain Python over lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.runtime._fake import TABLE, VOCABULARY, WIDTH, CutSpec, FakeBackend, Plain, make_program
from tmc_export.core.errors import BundleError, RuntimeInputError
from tmc_export.runtime._decoder import Decoder, Route

FASTV = (CutSpec(2, 3),)
PYRAMID = (CutSpec(1, 4, "renumber"), CutSpec(3, 2, "renumber"))
CARVE = (CutSpec(2, 3, kv=(0, 1)),)
MIXED = (CutSpec(1, 4, "renumber"), CutSpec(3, 2))
EARLY = (CutSpec(0, 3),)


def _decoder(cuts: Sequence[CutSpec] = (), **settings: Any) -> tuple[Decoder, FakeBackend]:
    program = make_program(cuts, **settings)
    backend = FakeBackend(program)
    return Decoder(program, backend), backend


def _hidden(group: Sequence[int], seed: int = 0) -> Any:
    return np.random.default_rng(seed + 100 * len(group)).standard_normal((len(group), WIDTH)).astype(np.float32)


def _say(decoder: Decoder, plain: Plain, group: Sequence[int], seed: int = 0, route: Route = "auto", steps: int = 2) -> str:
    """One turn in both, then some tokens; every logit must be equal."""
    hidden, start = _hidden(group, seed), decoder.next_position
    positions = np.arange(start, start + len(group))[None]
    trace = decoder.turn(hidden, positions, np.array(group), start + len(group), route)
    np.testing.assert_allclose(trace.logits, plain.feed(hidden, group), rtol=1e-4, atol=1e-5)
    for token in range(3, 3 + steps):
        np.testing.assert_allclose(decoder.step(token), plain.feed(TABLE[[token]], [0], select=False), rtol=1e-4, atol=1e-5)
    for slots in decoder.slots:
        assert slots.used == len(plain.cache[slots.block.first])
        assert slots.order[0, : slots.used].tolist() == [entry[2] for entry in plain.cache[slots.block.first]]
        assert slots.valid[0].sum() == slots.used
    return trace.route


ONE = [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
FIRST = ONE[2:]
TWO = [0, *[1] * 6, 0, *[2] * 6, 0]
TEXT = [0] * 5


@pytest.mark.parametrize("cuts", [(), FASTV, PYRAMID, CARVE, MIXED, EARLY], ids=["none", "fastv", "pyramid", "carve", "mixed", "early"])
@pytest.mark.parametrize("route", ["whole", "chunked"])
def test_one_picture(cuts: tuple[CutSpec, ...], route: Route) -> None:
    for group in (ONE, FIRST, [0, *FIRST, 0, 0, 0, 0, 0]):  # the last fills the bucket
        decoder, _ = _decoder(cuts)
        assert _say(decoder, Plain(cuts), group, route=route) == route


@pytest.mark.parametrize("cuts", [FASTV, PYRAMID, CARVE, MIXED, EARLY], ids=["fastv", "pyramid", "carve", "mixed", "early"])
@pytest.mark.parametrize("turns", [(ONE, TEXT), (TEXT, ONE), (ONE, ONE), (TWO, TEXT), (TEXT, FIRST, TEXT), (FIRST, FIRST)])
def test_turns_with_and_without_pictures(cuts: tuple[CutSpec, ...], turns: tuple[list[int], ...]) -> None:
    """A bucket of two pictures, filled or not; a later turn sees what earlier ones selected."""
    decoder, _ = _decoder(cuts, images=2, text=16, new=12)
    plain = Plain(cuts)
    for number, group in enumerate(turns):
        _say(decoder, plain, group, seed=number)


def test_the_comparison_can_fail() -> None:
    decoder, _ = _decoder(FASTV)
    with pytest.raises(AssertionError):
        _say(decoder, Plain((CutSpec(2, 2),)), ONE)


def test_blocks_split_without_a_cut_change_nothing() -> None:
    for cuts in (FASTV, CARVE, PYRAMID):
        decoder, _ = _decoder(cuts, splits=(1, 2, 3), new=16)
        plain = Plain(cuts)
        for number, group in enumerate((ONE, TEXT)):
            _say(decoder, plain, group, seed=number)


def test_kv_pruned_in_earlier_layers_needs_one_set_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = _decoder((CutSpec(2, 3, kv=(0,)),))
    with pytest.raises(BundleError, match="share one slot table"):
        _say(decoder, Plain(), ONE)
    assert [s.used for s in decoder.slots] == [0, 0], "the turn is undone"


@pytest.mark.parametrize("count", [3, 10, 11, 13, 16])
def test_a_text_only_turn_is_cut_nowhere_and_fits_every_bucket_or_goes_in_chunks(count: int) -> None:
    """Behind the cut the bucket holds 3 + 8 tokens; a longer text must not be fed to a prefill graph in two pieces that do not see each
    other."""
    decoder, backend = _decoder(FASTV, new=20)
    route = _say(decoder, Plain(FASTV), [0] * count)
    assert route == ("whole" if 4 < count <= 11 else "chunked")
    assert not any(file.startswith("compress") for file in backend.ran)


def test_route_whole_where_it_does_not_apply() -> None:
    decoder, _ = _decoder(FASTV, new=20)
    with pytest.raises(RuntimeInputError, match="12 tokens exceed the bucket of 11"):
        _say(decoder, Plain(), [0] * 12, route="whole")
    _say(decoder, Plain(FASTV), TEXT)
    with pytest.raises(RuntimeInputError, match="has begun"):
        _say(decoder, Plain(), TEXT, route="whole")


def test_text_that_fits_the_bucket_only_because_a_picture_is_missing_is_not_cut_off_behind_the_cut() -> None:
    """Two pictures' bucket holds 12 + 8 tokens, 6 + 8 behind the cut: one picture with 14 text tokens fits the first and not the second."""
    decoder, _ = _decoder(FASTV, images=2)
    _say(decoder, Plain(FASTV), [*[1] * 6, *[0] * 11], steps=0)
    decoder.reset()
    with pytest.raises(RuntimeInputError, match="has 14 text tokens beside pictures, the bundle takes 11"):
        _say(decoder, Plain(FASTV), [*[1] * 6, *[0] * 14])
    assert decoder.length == 0 and [s.used for s in decoder.slots] == [0, 0]


def test_too_many_tokens_or_pictures_are_refused_and_leave_the_conversation_as_it_was() -> None:
    decoder, _ = _decoder(FASTV, new=8)
    plain = Plain(FASTV)
    _say(decoder, plain, TEXT)
    for group, says in (
        ([1] * 6 + [0] * 9, "the prompt has 15 tokens, the bucket holds 14"),
        ([1] * 7 + [0], "picture 1 brings 7 tokens"),
        ([2] * 6 + [0], "the bundle takes 1 picture"),
        ([0] * 14, "block 1 has 19 slots, 7 are used and 14 more are needed"),
    ):
        with pytest.raises(RuntimeInputError, match=says):
            _say(decoder, Plain(), group)
    _say(decoder, plain, ONE[:8], seed=5)


@pytest.mark.parametrize("file", ["block_0_chunk", "compress_1", "block_1_chunk"])
def test_an_interrupted_turn_is_undone(file: str) -> None:
    decoder, backend = _decoder(CARVE, new=16)
    plain = Plain(CARVE)
    _say(decoder, plain, TEXT)
    backend.fail_at = file
    with pytest.raises(KeyboardInterrupt):
        _say(decoder, Plain(), ONE)
    backend.fail_at = ""
    _say(decoder, plain, ONE, seed=3)


def test_the_context_is_full_when_one_block_is() -> None:
    decoder, _ = _decoder(FASTV, new=2)
    plain = Plain(FASTV)
    _say(decoder, plain, ONE + [0, 0, 0, 0], steps=2)
    assert decoder.room() == 0
    with pytest.raises(RuntimeInputError, match="the context is full: block"):
        decoder.step(3)


def test_a_mark_takes_the_conversation_back() -> None:
    decoder, _ = _decoder(PYRAMID, new=40, images=2, text=16)
    plain, other = Plain(PYRAMID), Plain(PYRAMID)
    _say(decoder, plain, ONE)
    _say(_decoder(PYRAMID, new=40, images=2, text=16)[0], other, ONE)
    mark = decoder.mark()
    _say(decoder, plain, TEXT, seed=1)
    decoder.rewind(mark)
    _say(decoder, other, TEXT, seed=2)
    decoder.reset()
    _say(decoder, Plain(PYRAMID), ONE)


def test_what_a_turn_tells() -> None:
    decoder, _ = _decoder(PYRAMID, images=2)
    trace = decoder.turn(_hidden(ONE), np.arange(10)[None], np.array(ONE), 10)
    assert trace.visual == [4, 2], "of the picture that was given, not of the bucket"
    assert sorted(trace.kept) == [(1, 0), (2, 0)]
    assert (trace.kept[1, 0][:4] >= 0).all() and (trace.kept[1, 0][4:] == -1).all()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 14, 30])
def test_embedding_any_number_of_tokens(count: int) -> None:
    decoder, _ = _decoder()
    ids = np.arange(count) % VOCABULARY
    np.testing.assert_array_equal(decoder.embed(ids), TABLE[ids])
