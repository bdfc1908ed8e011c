from __future__ import annotations

import pytest

from tests.passes._models import graph
from tmc_export.core.errors import ExportError
from tmc_export.passes.assert_static import REFUSED_OPERATORS, AssertStaticPass

GOOD = "(float[2, 4] x) => (float[2, 4] y) <float[2, 4] a> { a = Neg(x)  y = Neg(a) }"


def check(text: str) -> None:
    assert not AssertStaticPass("block_0")(graph(text)).modified


def test_a_static_graph_passes() -> None:
    check(GOOD)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("float[2, 4] x", "float[T, 4] x"), "graph input or output 'x'"),
        (GOOD.replace("float[2, 4] y", "float[N, 4] y"), "graph input or output 'y'"),
        (GOOD.replace(" <float[2, 4] a>", ""), "output of Neg 'a'"),
        ("(float[2, 4] x) => (int64[2, 8] y) { y = NonZero(x) }", "NonZero"),
        ("(float[2, 4] x) => (float[2, 4] y) { y = com.microsoft.Gelu(x) }", "com.microsoft::Gelu"),
        (
            "(float[2, 4] x, int64[2, 4] i) => (float[2, 4] y) { y = ScatterElements<axis = 0, reduction = \"add\">(x, i, x) }",
            "ScatterElements",
        ),
    ],
)  # fmt: skip
def test_refusals_name_graph_and_reason(text: str, says: str) -> None:
    with pytest.raises(ExportError) as caught:
        check(text)
    assert str(caught.value).startswith("block_0: ") and says in str(caught.value)


def test_an_optional_output_left_out_has_no_shape() -> None:
    text = "(float[2, 4] x, float[4] w) => (float[2, 4] y, float[2, 1] s) { y, , s = LayerNormalization(x, w) }"
    check(text)
    with pytest.raises(ExportError, match="output of LayerNormalization 'm'"):
        check(text.replace("y, , s", "y, m, s"))


def test_scatter_without_reduction_passes() -> None:
    check("(float[2, 4] x, int64[2, 4] i) => (float[2, 4] y) { y = ScatterElements<axis = 0>(x, i, x) }")


def test_the_refused_are_refused() -> None:
    assert {"NonZero", "Range", "BitwiseAnd", "Unique"} <= REFUSED_OPERATORS
