from __future__ import annotations

from collections.abc import Mapping

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from tmc_export.export.materialize import WeightCache, materialized  # noqa: E402


class Source:
    """Weights that count how often each is read; `twin` has the bytes of `0.weight`."""

    def __init__(self, model: nn.Module) -> None:
        self._state = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
        self.reads: list[str] = []

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._state.items()}

    def identity(self, name: str) -> str:
        return name

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        self.reads.append(name)
        return self._state[name].to(dtype)

    def state(self) -> dict[str, Tensor]:
        return self._state


def model() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))


def names(of: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in of.named_parameters()}


def test_a_model_without_weights_computes_and_has_none_afterwards() -> None:
    empty, x = model(), torch.randn(3, 4)
    source = Source(empty)
    full = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))
    full.load_state_dict(source.state())
    with materialized(empty, names(empty), WeightCache(source, torch.float32, 1 << 20)), torch.no_grad():
        got = empty(x)
        again = empty(x)
    torch.testing.assert_close(got, full(x))
    torch.testing.assert_close(again, got)
    assert all(p.is_meta for p in empty.parameters()) and len(source.reads) == 6, "each was read once"
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        empty(x).numpy()


def test_weights_leave_even_when_a_module_fails() -> None:
    empty = model()
    with materialized(empty, names(empty), WeightCache(Source(empty), torch.float32, 1 << 20)):
        with pytest.raises(RuntimeError):
            empty(torch.randn(3, 5))
        assert all(p.is_meta for p in empty.parameters())


def test_what_does_not_fit_is_read_again() -> None:
    empty, x = model(), torch.randn(3, 4)
    source = Source(empty)
    with materialized(empty, names(empty), WeightCache(source, torch.float32, 8 * 8 * 4)), torch.no_grad():
        first, second = empty(x), empty(x)
    torch.testing.assert_close(first, second)
    assert len(source.reads) > 6


class Patches(nn.Module):
    """Reads the kernel of a convolution as a matrix, as Qwen's encoder does."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.proj = kind(4, 8, 1) if kind is nn.Conv2d else kind(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.proj.weight.flatten(1))


def test_a_kernel_is_there_for_who_reads_it_without_running_the_convolution() -> None:
    for kind in (nn.Conv2d, nn.Linear):
        with torch.device("meta"):
            empty = Patches(kind)
        source = Source(empty)
        with materialized(empty, names(empty), WeightCache(source, torch.float32, 1 << 20)), torch.no_grad():
            x = torch.randn(3, 4)
            got, want = empty(x), x @ source.state()["proj.weight"].flatten(1).T
            right = not got.is_meta and torch.allclose(got, want, atol=1e-5)
        assert right == (kind is nn.Conv2d)  # the twin: other modules have theirs while they run themselves
        assert all(p.is_meta for p in empty.parameters())
