"""Which sums over a layer's attention map its own block makes, so that no graph computes the map a second time.

A cut that scores with sums over all rows needs the whole map of the layer before it, and onnxruntime writes that map anyway: the block
adds up what its attention just computed. Elsewhere the compress graph computes the map once more (`surgery/_rows.py`): on TensorRT, whose
fused attention never has a map; in half precision, where weights are rounded and scores must not be; and where a layer has a window or a
picture a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tmc_export.graphs._contract import Attention
from tmc_export.plan.rows import handed_rows, swept
from tmc_export.plan.types import Plan

__all__ = ["sum_in_blocks", "summed_by_block"]


def summed_by_block(needs: Sequence[Attention]) -> tuple[Attention, ...]:
    """Those of one layer's needs that its block adds up, where it may: sums that read the whole map, after softmax."""
    return tuple(need for need in swept(needs) if not need.logits)


def sum_in_blocks(plan: Plan) -> Plan:
    """Return the plan with the sums that blocks make moved there: `BlockPlan.row_sums` and `CutPlan.summed`."""
    if plan.runtime != "onnxruntime" or plan.dtype != "float32":
        return plan
    blocks, cuts = list(plan.blocks), list(plan.cuts)
    for number, cut in enumerate(cuts):
        needs, layer = cut.attention("previous"), cut.layer - 1
        summed = summed_by_block(needs)
        if cut.before_block == 0 or not summed or plan.windows[layer] is not None:
            continue
        before = blocks[cut.before_block - 1]
        if before.since:
            continue
        cuts[number] = replace(cut, summed=summed)
        left = tuple(need for need in needs if need not in summed)
        blocks[cut.before_block - 1] = replace(before, row_sums={layer: summed}, query_rows={layer: handed_rows(left)} if left else {})
    return replace(plan, blocks=tuple(blocks), cuts=tuple(cuts))
