from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from numpy.typing import NDArray

from tests.passes._models import graph, operators, run
from tmc_export.passes.skip_future_keys import SkipFutureKeysPass

SHARED = """(float[B, 6, T, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v, float[B, 1, T, S] mask) => (float[B, 6, T, 4] y) {
  k5 = Unsqueeze(k, two)  ke = Expand(k5, wide)  kh = Reshape(ke, flat)  kt = Transpose<perm = [0, 1, 3, 2]>(kh)
  v5 = Unsqueeze(v, two)  ve = Expand(v5, wide)  vh = Reshape(ve, flat)
  s = MatMul(q, kt)  m = Add(s, mask)  w = Softmax<axis = -1>(m)  z = MatMul(w, vh)  y = Identity(z)
}"""
OWN = """(float[B, 2, T, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v, float[B, 1, T, S] mask) => (float[B, 2, T, 4] y) {
  kt = Transpose<perm = [0, 1, 3, 2]>(k)  s = MatMul(q, kt)  m = Add(s, mask)  w = Softmax<axis = -1>(m)  z = MatMul(w, v)  y = Identity(z)
}"""


def attention(text: str, batch: int, rows: int, past: int) -> ir.Model:
    keys = rows + past
    for name, size in (("B,", batch), ("T,", rows), ("S,", keys), ("S]", keys)):
        text = text.replace(name, f"{size}{name[-1]}")
    more = {"two": np.array([2]), "wide": np.array([batch, 2, 3, keys, 4]), "flat": np.array([batch, 6, keys, 4])} if "two" in text else {}
    return common.ShapeInferencePass()(graph(text, **more)).model


def feed(model: ir.Model, past: int, valid: int, order: NDArray[Any] | None = None) -> dict[str, NDArray[Any]]:
    """Values, and the mask of a turn whose last rows are padding, behind a past of which one slot is empty."""
    rng = np.random.default_rng(0)
    found = {v.name or "": rng.standard_normal(tuple(v.shape or ())).astype(np.float32) for v in model.graph.inputs}
    batch, _, rows, keys = found["mask"].shape
    mine = np.where(np.arange(rows) < valid, np.arange(rows) if order is None else order, -1)
    other = np.where(np.arange(keys) < past, np.arange(keys) - past, np.concatenate([np.zeros(past, int), mine]))
    alive = np.concatenate([np.arange(past) != 1, mine >= 0])
    seen = alive[None] & (other[None] <= mine[:, None]) & (mine[:, None] >= 0)
    return found | {"mask": np.broadcast_to(np.where(seen, 0.0, -3.0e4).astype(np.float32), (batch, 1, rows, keys)).copy()}


def cut(text: str, batch: int, rows: int, past: int) -> tuple[ir.Model, ir.Model]:
    before, after = attention(text, batch, rows, past), attention(text, batch, rows, past)
    assert SkipFutureKeysPass()(after).modified
    common.RemoveUnusedNodesPass()(after)
    return before, common.ShapeInferencePass()(after).model


@pytest.mark.parametrize(("text", "batch", "rows", "past"), [
    (SHARED, 1, 192, 0), (SHARED, 2, 200, 0), (SHARED, 1, 333, 70), (OWN, 1, 384, 0), (OWN, 2, 300, 9), (SHARED, 1, 1500, 0),
])  # fmt: skip
@pytest.mark.parametrize("padding", [0, 37])
def test_rows_in_order_get_what_they_got(text: str, batch: int, rows: int, past: int, padding: int) -> None:
    before, after = cut(text, batch, rows, past)
    assert "Expand" not in operators(after)
    x, valid = feed(before, past, rows - padding), rows - padding
    np.testing.assert_allclose(run(after, x)[0][:, :, :valid], run(before, x)[0][:, :, :valid], rtol=0, atol=2e-6)
    shifted = {**x, "k": np.roll(x["k"], 1, axis=2)}
    assert np.abs(run(after, shifted)[0] - run(before, x)[0])[:, :, :valid].max() > 1e-2  # keys of other rows would be seen


def test_later_keys_are_not_read() -> None:
    """Rows out of order would see less than the mask allows, so that the order is a promise of who asks for the pass."""
    before, after = cut(SHARED, 1, 256, 0)
    x = feed(before, 0, 256, order=np.arange(256)[::-1])
    assert np.abs(run(after, x)[0] - run(before, x)[0]).max() > 1e-2
    later = {**feed(before, 0, 256)}
    broken = {**later, "k": np.where(np.arange(256)[:, None] >= 64, np.nan, later["k"]).astype(np.float32)}
    assert np.isfinite(run(after, broken)[0][:, :, :64]).all() and not np.isfinite(run(before, broken)[0][:, :, :64]).any()


def test_work_falls_with_the_rows() -> None:
    """640 rows in ten blocks of 64: products over 11/20 of the map."""
    _, after = cut(SHARED, 1, 640, 0)
    maps = [tuple(n.outputs[0].shape or ()) for n in after.graph if n.op_type == "Softmax"]
    assert len(maps) == 10 and sum(s[2] * s[3] for s in maps) * 20 == 640 * 640 * 11


def test_layers_with_one_mask_share_its_parts() -> None:
    model = attention(OWN, 1, 384, 0)
    text = OWN.replace(
        "y = Identity(z)", "t = MatMul(z, kt)  n = Add(t, mask)  u = Softmax<axis = -1>(n)  x = MatMul(u, v)  y = Identity(x)"
    )
    double = attention(text, 1, 384, 0)
    assert SkipFutureKeysPass()(model).modified and SkipFutureKeysPass()(double).modified
    parts = [[n for n in m.graph if n.op_type == "Slice" and n.inputs[0] is m.graph.inputs[3]] for m in (model, double)]
    assert len(parts[0]) == len(parts[1]) == 3


@pytest.mark.parametrize(("text", "rows", "past"), [(SHARED, 64, 0), (SHARED, 1, 400), (OWN, 128, 0)])
def test_few_rows_stay_in_one_piece(text: str, rows: int, past: int) -> None:
    assert not SkipFutureKeysPass()(attention(text, 1, rows, past)).modified


def test_attention_without_a_mask_is_not_causal() -> None:
    text = OWN.replace("m = Add(s, mask)  w = Softmax<axis = -1>(m)", "w = Softmax<axis = -1>(s)")
    assert not SkipFutureKeysPass()(attention(text, 1, 384, 0)).modified


def test_a_mask_of_other_shape_is_left_alone() -> None:
    text = OWN.replace("float[B, 1, T, S] mask", "float[B, 1, 1, S] mask")
    assert not SkipFutureKeysPass()(attention(text, 1, 384, 0)).modified


def summed(text: str, what: str) -> str:
    """The graph with a second output, which reads the map `w`."""
    return text.replace("w = Softmax<axis = -1>(m)", f"w = Softmax<axis = -1>(m)  {what}").replace(
        "float[B, 1, T, S] mask)", "float[B, 1, T, S] mask, float[B, 2, T] which)"
    )


MAX = "top = ReduceMax<keepdims = 0>(w, one)  u = MatMul(which, top)  total = Identity(u)"
EACH = "wide_which = Unsqueeze(which, one)  u = MatMul(wide_which, w)  total = Identity(u)"
OTHER = "u = ReduceMean<keepdims = 0>(w, one)  total = Identity(u)"


def with_sums(text: str, what: str, rows: int, past: int) -> ir.Model:
    keys, heads = rows + past, 6 if "two" in text else 2
    shape = {MAX: f"1, 2, {keys}", EACH: f"1, {heads}, 2, {keys}", OTHER: f"1, {rows}, {keys}"}[what]
    text = summed(text, what)
    text = text.replace("T, 4] y)", f"T, 4] y, float[{shape}] total)")
    for name, size in (("B,", 1), ("T,", rows), ("T]", rows), ("S,", keys), ("S]", keys)):
        text = text.replace(name, f"{size}{name[-1]}")
    more = {"two": np.array([2]), "wide": np.array([1, 2, 3, keys, 4]), "flat": np.array([1, 6, keys, 4])} if "two" in text else {}
    return common.ShapeInferencePass()(graph(text, one=np.array([1]), **more)).model


@pytest.mark.parametrize("what", [MAX, EACH])
@pytest.mark.parametrize(("text", "rows", "past"), [(SHARED, 200, 0), (SHARED, 150, 33), (OWN, 300, 0)])
def test_sums_over_rows_are_added_up_block_by_block(text: str, what: str, rows: int, past: int) -> None:
    before, after = with_sums(text, what, rows, past), with_sums(text, what, rows, past)
    assert SkipFutureKeysPass()(after).modified
    common.RemoveUnusedNodesPass()(after)
    assert [v.name for v in after.graph.outputs] == ["y", "total"] and operators(after).count("Softmax") > 1
    x = feed(before, past, rows - 9)
    x["which"] = (x["which"] > 0).astype(np.float32) * (np.arange(rows) < rows - 9)
    for got, want in zip(run(after, x), run(before, x), strict=True):
        got, want = (v[:, :, : rows - 9] if v.shape[1:3] == (6 if text is SHARED else 2, rows) else v for v in (got, want))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    other = {**x, "which": np.roll(x["which"], 1, -1)}
    assert np.abs(run(after, other)[1] - run(before, x)[1]).max() > 1e-2  # rows beside those asked for would be seen


def test_a_map_that_something_else_reads_stays_whole() -> None:
    assert not SkipFutureKeysPass()(with_sums(OWN, OTHER, 384, 0)).modified
