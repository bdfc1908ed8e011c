"""torch.onnx's table of translations is read once, and what is traced with it is what is traced with a table of its own."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.export.test_capture import captured, checkpoint  # noqa: F401 - a fixture
from tmc_export.export import capture
from tmc_export.export.checkpoint import Checkpoint
from tmc_export.export.translations import shared_translations


@pytest.fixture
def registry() -> Any:
    return pytest.importorskip("torch.onnx._internal.exporter._registration").ONNXRegistry


def test_it_is_read_once_for_each_opset(registry: Any) -> None:
    own = vars(registry)["from_torchlib"]
    with shared_translations():
        first = registry.from_torchlib(opset_version=21)
        assert registry().from_torchlib(opset_version=21) is first  # as torch calls it
        assert registry.from_torchlib(opset_version=20) is not first
    with shared_translations():
        assert registry.from_torchlib(opset_version=21) is first
    assert vars(registry)["from_torchlib"] is own
    assert registry.from_torchlib(opset_version=21) is not registry.from_torchlib(opset_version=21)  # which is why it is shared


def test_torch_s_own_is_back_after_an_error(registry: Any) -> None:
    own = vars(registry)["from_torchlib"]
    with pytest.raises(KeyError), shared_translations():
        raise KeyError
    assert vars(registry)["from_torchlib"] is own


def test_a_torch_that_keeps_it_elsewhere_reads_its_own(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.onnx._internal.exporter._registration.ONNXRegistry")
    with shared_translations():
        assert not isinstance(vars(registry)["from_torchlib"], staticmethod)


def test_the_same_graph(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    def traced() -> bytes:
        return bytes(ir.to_proto(captured(checkpoint)).SerializeToString(deterministic=True))

    shared = [traced(), traced()]
    monkeypatch.setattr(capture, "shared_translations", contextlib.nullcontext)
    assert [traced()] * 2 == shared
