"""The choice of tokens: reproducible, the set that transformers' warpers leave, and stops that cut exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tmc_export.core.errors import BundleError, RuntimeInputError
from tmc_export.runtime._sampling import Sampler, Sampling, StopStrings, eos_ids, probabilities


def logits(seed: int, size: int = 200, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def test_greedy_takes_the_lowest_of_equals() -> None:
    values = np.zeros(50, dtype=np.float32)
    values[[7, 20, 49]] = 4.0
    assert Sampler(Sampling()).pick(values) == 7
    assert Sampler(Sampling()).pick(values.astype(np.float16)) == 7
    values[20] = 4.5
    assert Sampler(Sampling()).pick(values) == 20


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, top_k=5), Sampling(1.3, top_p=0.8), Sampling(0.9, top_k=40, top_p=0.5)])
@pytest.mark.parametrize("seed", range(4))
def test_probabilities_equal_the_warpers(sampling: Sampling, seed: int) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    values = logits(seed)
    scores = process.TemperatureLogitsWarper(sampling.temperature)(None, torch.from_numpy(values)[None])
    if sampling.top_k:
        scores = process.TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = process.TopPLogitsWarper(sampling.top_p)(None, scores)
    theirs = scores.softmax(-1)[0].numpy()
    ours = probabilities(values, sampling)
    assert np.array_equal(ours > 0, theirs > 0)
    # the reference computes in float32: 200 values summed, rounding of about 1e-7 each
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not np.allclose(ours, probabilities(values, Sampling(sampling.temperature * 1.01)), rtol=1e-5, atol=1e-7)


def test_ties_at_the_border_of_top_k_go_to_the_lowest_ids() -> None:
    values = np.tile(np.array([2.0, 1.0, 1.0, 0.0], dtype=np.float32), 250)  # 250 twos, 500 ones
    kept = np.flatnonzero(probabilities(values, Sampling(1.0, top_k=253)))
    assert kept.tolist() == sorted([*range(0, 1000, 4), 1, 2, 5])


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    values = logits(0, size=8, scale=1.0)
    values[3] = -np.inf
    sampling = Sampling(0.8, seed=5)
    sampler, twin, other = Sampler(sampling), Sampler(sampling), Sampler(Sampling(0.8, seed=6))
    drawn = [sampler.pick(values) for _ in range(4000)]
    assert drawn[:50] == [twin.pick(values) for _ in range(50)]
    assert drawn[:50] != [other.pick(values) for _ in range(50)]
    share = np.bincount(drawn, minlength=8) / len(drawn)
    assert share[3] == 0
    # four standard errors of a share of at most one half, 4000 draws
    np.testing.assert_allclose(share, probabilities(values, sampling), atol=4 * 0.5 / np.sqrt(4000))


def test_the_last_draw_of_the_range_is_still_a_possible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Highest:
        def random(self) -> float:
            return float(np.nextafter(1.0, 0.0))

    sampler = Sampler(Sampling(1.0, seed=0))
    monkeypatch.setattr(sampler, "_random", Highest())
    for seed in range(200):
        values = logits(seed)
        values[150:] = -np.inf
        assert 0 <= sampler.pick(values) < 150


def test_a_very_low_temperature_is_greedy() -> None:
    assert Sampler(Sampling(1e-300, seed=0)).pick(logits(2)) == int(np.argmax(logits(2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"top_k": -1}, "top-k is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_not_an_answer(bad: float) -> None:
    values = logits(0)
    values[9] = bad
    for sampling in (Sampling(), Sampling(1.0)):
        with pytest.raises(BundleError, match="tmc-export verify"):
            Sampler(sampling).pick(values)
    with pytest.raises(BundleError):
        Sampler(Sampling()).pick(np.full(4, -np.inf, dtype=np.float32))


def test_eos_from_the_first_file_that_names_it() -> None:
    assert eos_ids({"eos_token_id": 3}) == {3}
    assert eos_ids({"eos_token_id": None}, {}, {"eos_token_id": [5, 7]}, {"eos_token_id": 1}) == {5, 7}
    assert eos_ids({}) == frozenset()
    assert 0 in eos_ids({"eos_token_id": 0})
    with pytest.raises(BundleError, match="eos_token_id is '</s>'"):
        eos_ids({"eos_token_id": "</s>"})


def run(strings: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stops = StopStrings(strings)
    shown = "".join(map(stops.push, pieces))
    return (shown if stops.stopped is not None else shown + stops.finish()), stops.stopped


@pytest.mark.parametrize(
    ("strings", "text", "expected", "stopped"),
    [
        (["END"], "a word END more", "a word ", "END"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (["aab"], "aaab", "a", "aab"),
        (["abab", "bc"], "aababcx", "a", "abab"),
        (["User:", "</s>"], "fine </s", "fine </s", None),
        (["é!"], "café! more", "caf", "é!"),
        ([], "everything", "everything", None),
        (["x", "xyz"], "1xyz", "1", "x"),
    ],
)
def test_stop_strings_cut_the_same_wherever_tokens_end(strings: list[str], text: str, expected: str, stopped: str | None) -> None:
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, len(text)), count) for count in (0, 1, 2)):
        borders = [0, *cuts, len(text)]
        assert run(strings, [text[a:b] for a, b in itertools.pairwise(borders)])[0] == expected
    assert run(strings, list(text)) == (expected, stopped)


def test_text_is_held_back_no_longer_than_needed() -> None:
    stops = StopStrings(["STOP"])
    assert stops.push("go ST") == "go "
    assert stops.push("AY") == "STAY"
    assert stops.push(" STOP it") == " " and stops.stopped == "STOP"
    assert stops.push("more") == "" and stops.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RuntimeInputError, match="empty"):
        StopStrings(["a", ""])
