from __future__ import annotations

import onnx_ir.passes.common as common

from tests.passes._models import graph, operators
from tmc_export.passes.drop_outputs import DropOutputsPass

TEXT = "(float[2, 4] x) => (float[2, 4] hidden_out, float[4] sums.1.0) { hidden_out = Neg(x)  sums.1.0 = ReduceSum<keepdims = 0>(x, axis) }"


def test_outputs_of_the_prefix_go_with_what_computed_them() -> None:
    import numpy as np

    model = graph(TEXT.replace("sums.1.0", "sums_1"), axis=np.array([0]))
    model.graph.outputs[1].name = "sums.1.0"
    assert DropOutputsPass("sums.")(model).modified
    common.RemoveUnusedNodesPass()(model)
    assert [v.name for v in model.graph.outputs] == ["hidden_out"] and operators(model) == ["Neg"]
    assert not DropOutputsPass("sums.")(model).modified
