"""Every registered method against the contract; every check also on a method that breaks it."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tests.graphs import _checks
from tests.graphs._checks import Example
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Budget, Compressed, Context, Layout, Method, MethodConfig, Site, Stage
from tmc_export.graphs._ops import gather
from tmc_export.graphs._synthetic import FACTS
from tmc_export.graphs.fastv import FastV

EXAMPLES = list(_checks.examples())
EVERY = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.id)
QUICK_ENGINES = ("fastv", "visionzip")


def _by_cost(quick: tuple[str, ...] | None, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """The first example of a method is quick (of `quick` methods, where given), the others and those of `slow` are slow."""
    seen: set[str] = set()
    params = []
    for example in EXAMPLES:
        name = example.method.name
        fast = name not in seen and name not in slow and (quick is None or name in quick)
        seen.add(name)
        params.append(pytest.param(example, id=example.id, marks=() if fast else pytest.mark.slow))
    return pytest.mark.parametrize("example", params)


def test_every_method_is_tried() -> None:
    assert {e.method.name for e in EXAMPLES} == set(METHODS)


@EVERY
def test_layout_is_what_comes_out(example: Example) -> None:
    assert _checks.wrong_layout(example) == []


@EVERY
def test_a_batch_is_its_items(example: Example) -> None:
    assert _checks.wrong_batch(example) == []


@EVERY
def test_padding_has_no_say(example: Example) -> None:
    assert _checks.wrong_padding(example) == []


@EVERY
def test_a_budget_above_what_arrives_is_refused(example: Example) -> None:
    assert _checks.not_refused(example) == []


@_by_cost(None)
def test_onnxruntime_equals_pytorch_and_shapes_are_numbers(example: Example) -> None:
    assert _checks.wrong_onnx(example) == []


@_by_cost(QUICK_ENGINES)
def test_tensorrt_rtx_builds_an_engine(example: Example) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra [rtx] is not installed")
    assert _checks.wrong_engine(_checks.as_model(example)[0]) == []


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_says_what_it_is(name: str) -> None:
    method = METHODS.get(name)
    text = method.__doc__ or ""
    assert ">>>" in text
    order = [text.index(word) for word in ("Paper", "Shapes", ">>>", "Limits:", "Where the official code differs:")]
    assert order == sorted(order), "rule 12: paper, equation, shapes, example, limits, differences"
    for site in method.sites:
        Site.parse(site.replace("<l>", "1").replace("<k>", "2"))
    assert method.paper and method.official and method.mechanism
    with pytest.raises(ValueError):
        method.Config(no_such_option=1)
    with pytest.raises(ValueError, match="does not act at|needs|not at"):
        method.stages(Site.parse("prefill_end"), method.Config(**EXAMPLES_OF[name].options), FACTS)


EXAMPLES_OF = {e.method.name: e for e in reversed(EXAMPLES)}


# ------------------------------------------------------------------------------------------- the checks find broken methods
class _Broken(FastV):
    """FastV with something wrong, made by the subclasses; never registered."""

    name = "broken"


class _WrongCount(_Broken):
    @staticmethod
    def layout(stage: Stage, layout: Layout, config: FastV.Config, facts: object) -> Layout:  # type: ignore[override]
        right = FastV.layout(stage, layout, config, FACTS)
        return replace(right, segments=(replace(right.segments[0], tokens=right.tokens + 1),))


class _FirstItemOnly(_Broken):
    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: FastV.Config) -> Compressed:
        kept = FastV.apply(stage, tokens, context, config).source[:1].expand(tokens.shape[0], -1)
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))


class _BlindToPadding(_Broken):
    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: FastV.Config) -> Compressed:
        kept = FastV.apply(stage, tokens, replace(context, valid=torch.ones_like(context.valid)), config).source
        return Compressed(gather(tokens, kept), kept, gather(context.valid, kept))


class _AnotherWhenExported(_Broken):
    @staticmethod
    def apply(stage: Stage, tokens: Tensor, context: Context, config: FastV.Config) -> Compressed:
        out = FastV.apply(stage, tokens, context, config)
        return replace(out, tokens=out.tokens + 0.001) if torch.compiler.is_exporting() else out


class _Clamps(_Broken):
    @staticmethod
    def layout(stage: Stage, layout: Layout, config: FastV.Config, facts: object) -> Layout:  # type: ignore[override]
        k = min(config.keep.of(layout.tokens), layout.tokens)
        return FastV.layout(stage, layout, config.model_copy(update={"keep": Budget(tokens=k)}), FACTS)


class _RefusesWithoutRemedy(_Broken):
    @staticmethod
    def layout(stage: Stage, layout: Layout, config: FastV.Config, facts: object) -> Layout:  # type: ignore[override]
        raise ValueError("too many")


def _example(method: type[Method]) -> Example:
    return Example(method, "decoder.2", {"keep": "25%"})


def test_the_twin_that_is_not_broken_passes() -> None:
    example = _example(_Broken)
    for check in (_checks.wrong_layout, _checks.wrong_batch, _checks.wrong_padding, _checks.not_refused):
        assert check(example) == []


def test_a_wrong_layout_is_found() -> None:
    assert _checks.wrong_layout(_example(_WrongCount))


def test_a_shared_choice_is_found() -> None:
    assert _checks.wrong_batch(_example(_FirstItemOnly))


def test_blindness_to_padding_is_found() -> None:
    assert any("padding stayed" in d or "valid" in d for d in _checks.wrong_padding(_example(_BlindToPadding)))


def test_an_export_that_differs_is_found() -> None:
    assert any("tokens: off by" in d for d in _checks.wrong_onnx(_example(_AnotherWhenExported)))


def test_a_silent_clamp_is_found() -> None:
    assert any("not refused" in d for d in _checks.not_refused(_example(_Clamps)))
    layout = _checks.arriving("decoder.2")
    config: MethodConfig = FastV.Config(keep=4)
    assert any("no remedy" in d for d in _checks.refused(_RefusesWithoutRemedy, Stage(Site.parse("decoder.2")), layout, config, FACTS))


def _graph(op: str, out: int, shape: list[int | str], domain: str = "") -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", out, None)
    opsets = [helper.make_opsetid("", 18)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "g", [x], [y]), opset_imports=opsets)


def test_dynamic_shapes_and_foreign_operators_are_found() -> None:
    assert _checks.not_static(_graph("Relu", TensorProto.FLOAT, [1, 4])) == []
    assert _checks.not_static(_graph("Relu", TensorProto.FLOAT, [1, "n"]))
    assert _checks.not_static(_graph("NonZero", TensorProto.INT64, [1, 4]))
    assert any("operator of" in d for d in _checks.not_static(_graph("FusedGelu", TensorProto.FLOAT, [1, 4], "com.microsoft")))


def test_a_graph_that_tensorrt_rtx_refuses_is_found() -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra [rtx] is not installed")
    assert _checks.wrong_engine(_graph("NonZero", TensorProto.INT64, [1, 4]))
