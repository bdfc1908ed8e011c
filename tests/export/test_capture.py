"""Capturing modules without weights: symbols by name, initializers that read the checkpoint, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.passes._models import run
from tmc_export.core.errors import ExportError, ModelError
from tmc_export.export.capture import OPSET, capture, run_on_shapes
from tmc_export.export.checkpoint import Checkpoint, _Source
from tmc_export.export.tensors import CheckpointTensor


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, device="meta")
        self.second = nn.Linear(4, 4, bias=False, device="meta")
        self.unused = nn.Linear(4, 4, device="meta")

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return torch.cat([past, torch.nn.functional.relu(self.first(x)) @ self.second.weight], dim=1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(0)
    names = {n: tuple(p.shape) for n, p in Small().named_parameters()}
    save_file({n: torch.randn(s) for n, s in names.items()}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path, {n: _Source(((tmp_path / "model.safetensors", n),)) for n in names}, names)


def captured(checkpoint: Checkpoint, module: nn.Module | None = None) -> ir.Model:
    module = module or Small()
    return capture(
        module, [torch.zeros(1, 5, 4), torch.zeros(1, 7, 4)], input_names=["x", "past"], output_names=["y"],
        symbols=[{1: "T"}, {1: "P"}], model=module, checkpoint=checkpoint,
    )  # fmt: skip


def test_shapes_names_and_values(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read while tracing"))
        model = captured(checkpoint)
    assert model.opset_imports[""] == OPSET
    assert [str(v.shape) for v in model.graph.inputs] == ["[1,T,4]", "[1,P,4]"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    lazy = {n: v.const_value for n, v in model.graph.initializers.items() if isinstance(v.const_value, CheckpointTensor)}
    assert set(lazy) == {"first.weight", "first.bias", "second.weight"}  # what no node reads is not there
    x, past = (np.random.default_rng(i).normal(size=(1, n, 4)).astype(np.float32) for i, n in enumerate((3, 2)))
    weights = {n: checkpoint.read(n, torch.float32) for n in checkpoint.shapes}
    wanted = torch.cat(
        [torch.tensor(past), torch.relu(torch.tensor(x) @ weights["first.weight"].T + weights["first.bias"]) @ weights["second.weight"]], 1
    )
    np.testing.assert_allclose(run(model, {"x": x, "past": past})[0], wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_parameters_are_back_on_meta(checkpoint: Checkpoint) -> None:
    module = Small()
    before = {n: id(p) for n, p in module.named_parameters()}
    captured(checkpoint, module)
    assert {n: id(p) for n, p in module.named_parameters()} == before
    assert all(p.is_meta for p in module.parameters())


def test_the_same_bytes_each_time_and_no_paths(checkpoint: Checkpoint) -> None:
    found = [ir.to_proto(captured(checkpoint)).SerializeToString(deterministic=True) for _ in range(2)]
    assert found[0] == found[1]
    assert __file__.encode() not in found[0] and b"torch" not in found[0]


class Branches(Small):
    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return x if x.sum() > 0 else past  # depends on a value


def test_what_cannot_be_traced_is_one_line(checkpoint: Checkpoint) -> None:
    module = Branches()
    with pytest.raises(ExportError, match="Branches could not be traced") as caught:
        captured(checkpoint, module)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("error", [MemoryError("x"), OSError(28, "full"), ModelError("x")])
def test_errors_of_another_kind_pass(checkpoint: Checkpoint, error: Exception) -> None:
    class Fails(Small):
        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            raise error

    with pytest.raises(type(error)):
        captured(checkpoint, Fails())


def test_running_on_shapes_reads_and_computes_nothing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    class Watched(Small):
        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            out = super().forward(x, past)
            seen.append(tuple(out.shape))
            return out

    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("it was traced"))
    module = Watched()
    run_on_shapes(module, [torch.zeros(1, 5, 4), torch.zeros(1, 7, 4)])
    assert seen == [(1, 12, 4)] and all(p.is_meta for p in module.parameters())


def test_what_does_not_run_on_shapes_is_one_line() -> None:
    module = Branches()
    with pytest.raises(ExportError, match="Branches could not be traced: DataDependent") as caught:
        run_on_shapes(module, [torch.zeros(1, 5, 4), torch.zeros(1, 7, 4)])
    assert "\n" not in str(caught.value) and all(p.is_meta for p in module.parameters())
    with pytest.raises(MemoryError):

        class Fails(Small):
            def forward(self, x: Tensor, past: Tensor) -> Tensor:
                raise MemoryError

        run_on_shapes(Fails(), [torch.zeros(1), torch.zeros(1)])
