"""Names under `keep`, and what is refused rather than silently left undone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from tmc_export.core.errors import ExportError, LegalityError, TmcError
from tmc_export.plan.types import QuantizePlan
from tmc_export.quantize import SCHEMES
from tmc_export.quantize._weights import check_keep, is_kept
from tmc_export.quantize.calibrated import Calibrated

NAMES = [f"model.layers.{i}.{x}.weight" for i in (0, 1, 11) for x in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("layers.1", 2),
        ("layers.11", 2),
        ("down_proj", 3),
        ("mlp.down_proj", 3),
        ("layers.1.mlp.down_proj", 1),
        ("proj", 0),
        ("down", 0),
        ("layers", 6),
    ],
)
def test_keep_matches_whole_words(word: str, count: int) -> None:
    assert sum(is_kept(name, (word,)) for name in NAMES) == count


@pytest.mark.parametrize(
    ("word", "near"), [("down_prj", "did you mean 'down_proj'"), ("layers.7", "called like 'model.layers.11.mlp.down_proj.weight'")]
)
def test_a_keep_that_names_nothing_is_refused(word: str, near: str) -> None:
    with pytest.raises(LegalityError, match=f"quantize.decoder.keep: '{word}' names no weight") as caught:
        check_keep("decoder", ("down_proj", word), NAMES)
    assert near in str(caught.value) and "\n" not in str(caught.value)
    check_keep("decoder", ("down_proj", "layers.1"), NAMES)


def graph(operator: str = "MatMul", channels: int = 64, *, name: str = "layers.0.mlp.up_proj.weight", columns: int = 40) -> ir.Model:
    """`y = x · W`, W float32 `[channels, columns]`."""
    weight = np.random.default_rng(0).standard_normal((channels, columns)).astype(np.float32)
    x = ir.val("x", ir.DataType.FLOAT, (3, channels))
    w = ir.val(name, const_value=ir.tensor(weight, name=name))
    w.shape, w.type = ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    node = ir.node(operator, [x, w])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", ir.Shape((3, columns)), ir.TensorType(ir.DataType.FLOAT)
    inner = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 21}, name="g")
    return ir.Model(inner, ir_version=10)


def apply(model: ir.Model, **plan: object):
    return SCHEMES.get("int4")(model, QuantizePlan("int4", **plan), lambda name: name.startswith("layers."))


@pytest.mark.parametrize(
    ("channels", "block", "fix"), [(320, 128, "use block: 64, or keep"), (96, 64, "use block: 32, or keep"), (80, 32, "; keep them")]
)
def test_channels_that_are_no_multiple_of_the_block_are_refused(channels: int, block: int, fix: str) -> None:
    with pytest.raises(LegalityError, match=f"{block} does not divide the {channels} input channels") as caught:
        apply(graph(channels=channels), block=block)
    assert fix in str(caught.value) and "keep: [up_proj]" in str(caught.value)
    done = apply(graph(channels=channels), block=block, keep=("up_proj",))
    assert done.changed == () and done.kept == ("layers.0.mlp.up_proj.weight",)


def test_a_linear_read_in_an_unknown_way_is_refused() -> None:
    with pytest.raises(ExportError, match="is read by Gemm, and only MatMul is known"):
        apply(graph("Gemm"), block=32)
    assert apply(graph("Gemm"), block=32, keep=("up_proj",)).changed == ()


def test_what_is_of_another_part_is_left_alone() -> None:
    model = graph(name="head.weight")
    assert apply(model, block=32).changed == () and [n.op_type for n in model.graph] == ["MatMul"]


def test_equal_names_in_two_graphs_are_not_mistaken_for_one_weight(tmp_path) -> None:
    from tmc_export.export.store import WeightStore

    store, models = WeightStore(tmp_path), [graph(), graph()]
    other = models[1].graph.initializers["layers.0.mlp.up_proj.weight"]
    other.const_value = ir.tensor(other.const_value.numpy() * 2, name=other.name)
    for model in models:
        apply(model, block=32)
        store.externalize(model, "w.data")
    scales = [m.graph.initializers["layers.0.mlp.up_proj.weight.scale"].const_value.numpy() for m in models]
    assert np.array_equal(scales[1], 2 * scales[0])


def test_an_unknown_scheme_names_those_there_are() -> None:
    from tmc_export.recipe._schemes import BUILT

    assert set(SCHEMES) == set(BUILT)
    with pytest.raises(TmcError, match="unknown weight scheme 'nvfp5'; did you mean 'nvfp4'"):
        SCHEMES.get("nvfp5")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"dtype": "bfloat16", "quantize": {}}, "bfloat16 bundles are not built yet"),
        (
            {"dtype": "float32", "quantize": {"kv": QuantizePlan("fp16")}},
            "quantize.kv: fp16 slots beside float32 arithmetic are not built yet",
        ),
    ],
)
def test_what_is_not_built_is_refused(plan: dict[str, object], words: str) -> None:
    from tmc_export.api._schemes import PartSchemes

    with pytest.raises(LegalityError, match=words):
        PartSchemes(SimpleNamespace(**plan), None, None, None, Calibrated())  # type: ignore[arg-type]


def test_a_scheme_without_effect_is_an_error() -> None:
    from tmc_export.api._schemes import PartSchemes

    schemes = PartSchemes.__new__(PartSchemes)
    schemes._plan, schemes._changed = {"projector": QuantizePlan("fp16")}, {"projector": 0}
    schemes._found, schemes._kernels = Calibrated(), set()
    schemes.apply(graph(name="tower.fc1.weight"), "vision")
    with pytest.raises(ExportError, match="quantize.projector: no weight of that part was found"):
        schemes.finish()
    schemes.apply(graph(name="projector.linear_1.weight"), "vision")
    schemes.finish()
