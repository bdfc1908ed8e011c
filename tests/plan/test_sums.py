"""Which sums over a map the layer's own block makes, and where the compress graph computes the map again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan.conftest import TINY, Writer
from tmc_export.plan._flops import cut_flops
from tmc_export.plan.resolve import resolve
from tmc_export.plan.source import read_model_files
from tmc_export.plan.sums import sum_in_blocks
from tmc_export.plan.types import Plan

FITPRUNE = "at: decoder.2, method: fitprune, delete: [0, 40, 40]"
CPU = {"model": "dtype: float32", "inputs": "images: 1, text_tokens: 32, new_tokens: 16", "target": "device: cpu, runtime: onnxruntime"}


def plan_of(write: Writer, entry: str = FITPRUNE, **change: str) -> Plan:
    return resolve(write(entry, **{**CPU, **change}, source=TINY), read_model_files(TINY))


def test_sums_over_all_rows_are_made_where_the_map_is(write: Writer) -> None:
    plan = plan_of(write)
    assert [c.layer for c in plan.cuts] == [2, 3]
    for cut in plan.cuts:
        before = plan.blocks[cut.before_block - 1]
        assert [(n.rows, n.heads) for n in cut.summed] == [("visual", "max"), ("text", "max")] and not cut.scored("previous")
        assert before.row_sums == {cut.layer - 1: cut.summed} and not before.query_rows
        cost = cut_flops(plan, cut)
        assert cost.previous[0] == cost.scores == 0 and cost.summed == (cut.tokens_in, cut.tokens_in)
        assert cost.adding == 2 * cut.tokens_in**2 * (plan.facts.decoder.heads + 2)


@pytest.mark.parametrize("change", [
    {"target": "device: jetson-agx-orin-64gb, runtime: tensorrt, decode_width: 1"},  # fused attention has no map
    {"model": "dtype: float16"},  # its weights are rounded
])  # fmt: skip
def test_elsewhere_the_compress_graph_computes_the_map(write: Writer, change: dict[str, str]) -> None:
    plan = plan_of(write, **change)
    for cut in plan.cuts:
        before = plan.blocks[cut.before_block - 1]
        assert not cut.summed and not before.row_sums and before.query_rows == {cut.layer - 1: "all"}
        cost = cut_flops(plan, cut)
        assert cost.previous == (cut.tokens_in, before.capacity) and cost.scores > 10 * cut_flops(plan_of(write), cut).adding
        assert cost.adding == 0


def test_a_window_or_a_barrier_keeps_the_side_path(write: Writer) -> None:
    plan = plan_of(write, target="device: jetson-agx-orin-64gb, runtime: tensorrt, decode_width: 1")
    plain = replace(plan, runtime="onnxruntime")
    assert all(c.summed for c in sum_in_blocks(plain).cuts)
    assert not any(c.summed for c in sum_in_blocks(replace(plain, windows=(64,) * 4)).cuts)
    hidden = replace(plain, blocks=tuple(replace(b, since=True) for b in plain.blocks))
    assert not any(c.summed for c in sum_in_blocks(hidden).cuts)


@pytest.mark.parametrize("entry", [
    "at: decoder.2, method: fastv, keep: 50%",
    "at: decoder.2, method: pyramiddrop, layers: [2], keep: [50%]",
    "at: decoder.2, method: zipvl, keep: [50%]",
])  # fmt: skip
def test_few_rows_stay_in_the_compress_graph(write: Writer, entry: str) -> None:
    plan = plan_of(write, entry)
    assert plan.cuts and not any(c.summed for c in plan.cuts) and not any(b.row_sums for b in plan.blocks)
