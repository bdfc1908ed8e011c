"""VTW by hand: nothing visual is left, and nothing else happens."""

from __future__ import annotations

import pytest

from tests.graphs._checks import Example, wrong_layout
from tmc_export.graphs._contract import Site
from tmc_export.graphs._synthetic import FACTS, context_for
from tmc_export.graphs.vtw import VTW

CONFIG = VTW.Config()


@pytest.mark.parametrize("batch", [1, 3])
def test_every_visual_token_is_withdrawn(batch: int) -> None:
    stage, tokens, context = context_for(VTW, CONFIG, "decoder.15", batch=batch)
    out = VTW.apply(stage, tokens, context, CONFIG)
    assert out.tokens.shape == (batch, 0, FACTS.decoder.width)
    assert out.source.shape == out.valid.shape == (batch, 0)
    assert not out.kv and not out.state  # the KV of the layers before is whole


def test_the_layout_says_so_and_keeps_positions() -> None:
    stage, _, context = context_for(VTW, CONFIG, "decoder.15")
    after = VTW.layout(stage, context.layout, CONFIG, FACTS)
    assert (after.tokens, after.grid, after.positions, dict(after.kv_rows)) == (0, None, "keep", {})


@pytest.mark.parametrize("at", ["decoder.0", "decoder.28"])  # 28 layers: never seen, or seen by all
def test_a_cut_without_a_layer_on_both_sides_is_refused(at: str) -> None:
    with pytest.raises(ValueError, match="use decoder.1 to decoder.27"):
        VTW.stages(Site.parse(at), CONFIG, FACTS)


def test_one_token_too_many_is_found() -> None:
    class Keeps(VTW):
        @staticmethod
        def apply(stage, tokens, context, config):  # type: ignore[no-untyped-def]
            out = VTW.apply(stage, tokens, context, config)
            return type(out)(tokens[:, :1], context.source[:, :1], context.valid[:, :1])

    assert wrong_layout(Example(Keeps, "decoder.15"))
