from __future__ import annotations

import pytest

from tmc_export.core.errors import LegalityError
from tmc_export.engine._proto import GraphFacts
from tmc_export.engine._versions import VERSIONS, check_graph, version_for
from tmc_export.recipe.device import Device, devices


@pytest.mark.parametrize(
    ("version", "row", "typed", "stream"),
    [
        ("10.3.0.30", "10.3", True, False),
        ("100300", "10.3", True, False),
        ("10.7.0", "10.3", True, False),
        ("10.13.3.9", "10.13", True, True),
        ("10.16.1", "10.15", True, True),
        ("11.4.1", "11.0", False, True),
    ],
)
def test_rows(version: str, row: str, typed: bool, stream: bool) -> None:
    found = version_for(version)
    assert (found.name, found.strongly_typed_flag, found.stream_writer) == (row, typed, stream)


@pytest.mark.parametrize("version", ["8.6.1", "9.0", "new"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(LegalityError):
        version_for(version)


def test_rows_are_in_order() -> None:
    assert [row.minimum for row in VERSIONS] == sorted(row.minimum for row in VERSIONS)


def test_operators_and_opset() -> None:
    facts = GraphFacts(24, ("MatMul", "RMSNormalization"), (), (), 1)
    with pytest.raises(LegalityError, match="block_0: TensorRT 10.3 .* has no RMSNormalization"):
        check_graph("block_0", facts, version_for("10.3"))
    assert check_graph("block_0", facts, version_for("10.16")) == ()
    (warning,) = check_graph("block_0", GraphFacts(21, ("MatMul",), (), (), 1), version_for("10.3"))
    assert "opset 21 is above 20" in warning


def test_operators_of_the_newest_table_read_and_of_others() -> None:
    (warning,) = check_graph("cut", GraphFacts(20, ("MatMul", "Unique"), (), (), 1), version_for("10.16"))
    assert "cut: Unique: not supported by the parser of TensorRT 10.1" in warning
    assert check_graph("block_0", GraphFacts(20, ("MatMul", "trt::TRT_FP4DynamicQuantize"), (), (), 1), version_for("10.3")) == ()
    with pytest.raises(LegalityError, match=r"block_0: TensorRT has no com\.microsoft::GroupQueryAttention; build .* target\.runtime"):
        check_graph("block_0", GraphFacts(20, ("MatMul", "com.microsoft::GroupQueryAttention"), (), (), 1), version_for("11.0"))


BOARDS = [device for device in devices() if device.tensorrt.flavour == "tensorrt"]


@pytest.mark.parametrize("device", BOARDS, ids=lambda device: device.name)
def test_every_board_s_release_has_a_row_that_takes_its_opset(device: Device) -> None:
    assert device.tensorrt.version is not None
    assert device.tensorrt.opset <= version_for(device.tensorrt.version).opset
    assert {device.tensorrt.version} <= set(device.tensorrt.releases.values())
    for release in device.tensorrt.releases.values():
        version_for(release)
