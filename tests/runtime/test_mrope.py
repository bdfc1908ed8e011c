"""M-RoPE positions: equal to transformers' get_rope_index, for both Qwen generations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tmc_export.core.errors import RuntimeInputError
from tmc_export.runtime._chat import expand_image_tokens
from tmc_export.runtime._mrope import mrope_positions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE = 7
MODELS = ["Qwen2VL", "Qwen2_5_VL"]
LAYOUTS: list[tuple[list[int], list[tuple[int, int, int]]]] = [
    ([3, 4], [(1, 4, 6)]),
    ([0, 9], [(1, 2, 5)]),
    ([5, 0], [(1, 7, 3)]),
    ([0, 0], [(1, 1, 1)]),
    ([2, 1, 6], [(1, 4, 6), (1, 3, 8)]),
    ([1, 3, 2, 5], [(1, 8, 2), (1, 2, 2), (1, 5, 5)]),
    ([6], []),
]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """The model class on the meta device: get_rope_index reads only the configuration."""
    config = getattr(transformers, f"{request.param}Config")()
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = ["full_attention"]
    config.vision_config.depth = 1
    with torch.device("meta"):
        return getattr(transformers, f"{request.param}Model")(config)


def prompt(texts: list[int], grids: list[tuple[int, int, int]], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random text of the given lengths between pictures, expanded."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for index, length in enumerate(texts):
        ids += rng.integers(10, 100, length).tolist()
        ids += [IMAGE] if index < len(grids) else []
    return expand_image_tokens(ids, IMAGE, [t * h * w for t, h, w in grids])


@pytest.mark.parametrize(("texts", "grids"), LAYOUTS)
def test_equals_transformers(model: Any, texts: list[int], grids: list[tuple[int, int, int]]) -> None:
    ids, group = prompt(texts, grids)
    patches = torch.tensor([(t, h * 2, w * 2) for t, h, w in grids]) if grids else None
    theirs, delta = model.get_rope_index(
        torch.from_numpy(ids)[None], mm_token_type_ids=torch.from_numpy((group > 0).astype(np.int32))[None], image_grid_thw=patches
    )
    ours = mrope_positions(group, grids)
    assert np.array_equal(ours.positions, theirs[:, 0].numpy())
    assert ours.delta == int(delta)
    if grids:  # and the comparison can fail: another grid of as many tokens
        t, h, w = grids[0]
        if h != w:
            assert not np.array_equal(mrope_positions(group, [(t, w, h), *grids[1:]]).positions, theirs[:, 0].numpy())


def test_a_later_turn_is_the_rest_of_one_prompt() -> None:
    grids = [(1, 4, 6), (1, 3, 8)]
    _, group = prompt([2, 5, 6], grids)
    whole = mrope_positions(group, grids)
    cut = 2 + 24 + 3
    first = mrope_positions(group[:cut], grids[:1])
    second = mrope_positions(np.where(group[cut:] > 0, group[cut:] - 1, 0), grids[1:], start=first.next_position)
    assert np.array_equal(np.concatenate([first.positions, second.positions], axis=1), whole.positions)
    assert second.next_position == whole.next_position == int(whole.positions.max()) + 1


def test_an_empty_prompt_starts_where_it_is_told() -> None:
    empty = mrope_positions(np.zeros(0, dtype=np.int64), [], start=5)
    assert empty.positions.shape == (3, 0) and empty.next_position == 5


@pytest.mark.parametrize(
    ("group", "grids", "message"),
    [
        ([0, 1, 1, 1], [(1, 2, 2)], "has 3 tokens at index 1, but its grid is 2 x 2"),
        ([0, 1, 1, 0, 1, 1], [(1, 2, 2)], "has 2 tokens"),
        ([2, 1], [(1, 1, 1), (1, 1, 1)], "picture 1 comes next"),
        ([1, 2], [(1, 1, 1)], "tokens of picture 2, but 1 grids"),
        ([0, 0], [(1, 1, 1)], "1 grids were given, but the prompt holds 0"),
        ([1, 1], [(2, 1, 1)], "grid of 2 frames"),
    ],
)
def test_grids_that_do_not_fit(group: list[int], grids: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(RuntimeInputError, match=message):
        mrope_positions(np.array(group), grids)
