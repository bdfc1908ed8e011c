"""Slots and rows in the device's memory against those in arrays: every row of every head lands where it should, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.runtime._fake_cuda import FakeDriver, Fault
from tmc_export.core.errors import BundleError
from tmc_export.runtime._cuda import Copy, Cuda
from tmc_export.runtime._device import DevicePiece, DeviceRows, DeviceSlots, DeviceTensor, stride_of
from tmc_export.runtime._host import HostRows, HostSlots

Array = NDArray[Any]
NAMES = [f"past_key_values.{layer}.{kind}" for layer in (3, 4, 5) for kind in ("key", "value")]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    made = FakeDriver()
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.driver", made)
    yield made


@pytest.fixture
def cuda(driver: FakeDriver) -> Cuda:
    return Cuda("rtx")


def put(cuda: Cuda, driver: FakeDriver, array: Array, at: int | None = None) -> DeviceTensor:
    """An array on the device."""
    address = cuda.allocate(array.nbytes, "a test") if at is None else at
    driver.at(address, array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return DeviceTensor(address, array.shape, array.dtype)


def get(cuda: Cuda, driver: FakeDriver, held: Any) -> Array:
    cuda.synchronize()
    return driver.at(held.address, held.nbytes).view(held.dtype).reshape(held.shape).copy()


def new_rows(cuda: Cuda, driver: FakeDriver, shape: tuple[int, ...], dtype: str, seed: int, stacked: bool) -> tuple[dict[str, Any], Any]:
    """New rows as a graph makes them: behind one another in a stack, or anywhere."""
    rng = np.random.default_rng(seed)
    arrays = {n.replace("past_key_values", "present"): (rng.standard_normal(shape) * 20).astype(dtype) for n in NAMES}
    stride = stride_of(shape, np.dtype(dtype).itemsize)
    base = cuda.allocate(stride * len(arrays), "a stack")
    places = {n: base + k * stride if stacked else None for k, n in enumerate(arrays)}
    return {n: replace(put(cuda, driver, a, places[n]), stride=stride if stacked else 0) for n, a in arrays.items()}, arrays


SHAPES = [(1, 2, 12, 8), (1, 1, 7, 16), (1, 3, 5, 64), (1, 2, 150, 4)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "anywhere"])
def test_appended_rows_are_those_of_arrays(cuda: Cuda, driver: FakeDriver, shape: tuple[int, ...], dtype: str, stacked: bool) -> None:
    mine, theirs = DeviceSlots(cuda, NAMES, shape, dtype), HostSlots(NAMES, shape, dtype)
    used = 0
    for seed, (tokens, count) in enumerate(((4, 3), (2, 1), (1, 1))):
        given, arrays = new_rows(cuda, driver, (*shape[:2], tokens, shape[3]), dtype, seed, stacked)
        before = len(driver.calls)
        mine.append(given, used, count)
        assert [c.name for c in driver.calls[before:]] == ["copy"] * (1 if stacked else len(NAMES))
        theirs.append(arrays, used, count)
        used += count
    for name in NAMES:
        np.testing.assert_array_equal(get(cuda, driver, mine.tensors[name]), theirs.tensors[name])
        address = mine.tensors[name].address  # type: ignore[attr-defined]
        assert address % 256 == 0, "TensorRT takes no other"


MOVES = {
    "all but the first": [*range(1, 150)],
    "all but one in the middle": [*range(70), *range(71, 150)],
    "every second": [*range(0, 150, 2)],
    "far": [*range(100, 150)],
    "one": [149],
    "none": [],
    "what is there already": [*range(150)],
    "runs": [2, 3, 4, 10, 30, 31, *range(80, 149)],
}


@pytest.mark.parametrize("chosen", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("start", [0, 3])
def test_moved_rows_are_those_of_arrays(cuda: Cuda, driver: FakeDriver, chosen: list[int], start: int) -> None:
    """The made-up driver refuses copies that overlap themselves, so that long runs must go through spare memory."""
    shape = (1, 2, 160, 4)
    mine, theirs = DeviceSlots(cuda, NAMES, shape, "float32"), HostSlots(NAMES, shape, "float32")
    given, arrays = new_rows(cuda, driver, (1, 2, 155, 4), "float32", 7, True)
    mine.append(given, 0, 155)
    theirs.append(arrays, 0, 155)
    places = start + np.array(chosen, np.int64)
    mine.move(start, places)
    theirs.move(start, places)
    end = start + len(chosen)
    for name in NAMES:
        np.testing.assert_array_equal(get(cuda, driver, mine.tensors[name])[:, :, :end], np.asarray(theirs.tensors[name])[:, :, :end])


def test_a_move_that_forgets_the_overlap_is_found(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(self: DeviceSlots, source: int, target: int, count: int) -> None:
        self._copy(self._base + source * self._row, self._shape[2], self._stride, self._base + target * self._row, count)

    monkeypatch.setattr(DeviceSlots, "_shift", at_once)
    slots = DeviceSlots(cuda, NAMES, (1, 2, 160, 4), "float32")
    with pytest.raises(Fault, match="overlap"):
        slots.move(0, np.arange(1, 150))


def test_rows_that_do_not_fit_are_refused(cuda: Cuda, driver: FakeDriver) -> None:
    slots = DeviceSlots(cuda, NAMES, (1, 2, 12, 8), "float32")
    given, _ = new_rows(cuda, driver, (1, 2, 4, 8), "float32", 0, True)
    other, _ = new_rows(cuda, driver, (1, 2, 4, 16), "float32", 0, True)
    half, _ = new_rows(cuda, driver, (1, 2, 4, 8), "float16", 0, True)
    for present, start, count in ((given, 9, 4), (given, 0, 5), (other, 0, 1), (half, 0, 1), ({n: np.zeros(1) for n in given}, 0, 1)):
        with pytest.raises(BundleError, match="again"):
            slots.append(present, start, count)


@pytest.mark.parametrize(("axis", "shape"), [(1, (1, 5, 6)), (2, (1, 4, 5, 6))], ids=["hidden states", "query rows"])
def test_rows_put_together_and_taken_apart_are_those_of_arrays(cuda: Cuda, driver: FakeDriver, axis: int, shape: tuple[int, ...]) -> None:
    mine, theirs, at = DeviceRows(cuda, "rows", 11, axis), HostRows(axis), 0
    for seed, count in enumerate((5, 5, 1)):
        array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        mine.put(put(cuda, driver, array), at, count)
        theirs.put(array, at, count)
        at += count
    for start, stop, size in ((0, 11, 11), (0, 11, 16), (5, 10, 5), (10, 11, 4)):
        want = theirs.piece(start, stop, size)
        piece = mine.piece(start, stop, size)
        assert isinstance(piece, DevicePiece) and piece.shape == want.shape
        target = put(cuda, driver, np.full(want.shape, np.nan, np.float32))
        piece.copy_to(cuda, target)
        np.testing.assert_array_equal(get(cuda, driver, target), want)
    with pytest.raises(BundleError, match="takes 11 rows, 12 were made"):
        mine.put(put(cuda, driver, np.zeros(shape, np.float32)), 11, 1)


# --------------------------------------------------------------------------------------- the made-up driver finds faults
def test_reading_past_the_end_is_found(cuda: Cuda) -> None:
    one, two = cuda.allocate(512, "one"), cuda.allocate(512, "two")
    cuda.copy(Copy(one, two, 512))
    with pytest.raises(Fault, match="leave their allocation"):
        cuda.copy(Copy(one, two + 1, 512))
    with pytest.raises(Fault, match="leave their allocation"):
        cuda.copy(Copy(one, two, 64, height=8, source_pitch=64, target_pitch=65))
    with pytest.raises(Fault, match="nothing is allocated"):
        cuda.copy(Copy(4, two, 8))
    with pytest.raises(Fault, match="from one allocation into another"):
        cuda.copy(Copy(one, cuda.allocate(1 << 14, "three"), 64, height=2, source_pitch=two - one, target_pitch=64))


def test_memory_that_is_freed_is_used_no_more(cuda: Cuda) -> None:
    one, two = cuda.allocate(512, "one"), cuda.allocate(512, "two")
    cuda.copy(Copy(one, two, 512))
    with pytest.raises(Fault, match="while queued work uses it"):
        cuda.free(one)
    cuda = Cuda("rtx")
    one = cuda.allocate(512, "one")
    cuda.free(one)
    with pytest.raises(Fault, match="memory is freed"):
        cuda.clear(one, 4)


def test_page_locked_memory_must_stay_until_it_was_read(cuda: Cuda) -> None:
    target, source = cuda.allocate(512, "target"), cuda.pin(512, "source")
    cuda.upload(target, source.address, 512)
    mark = cuda.queued
    cuda.wait(mark)
    source.bytes[0] = 1
    cuda.upload(target, source.address, 512)
    source.bytes[0] = 2
    with pytest.raises(Fault, match="was written before"):
        cuda.wait(cuda.queued)
    with pytest.raises(Fault, match="not page-locked"):
        cuda.upload(target, np.zeros(512, np.uint8).ctypes.data, 512)


def test_a_copy_that_the_driver_refuses_is_an_error_of_ours(cuda: Cuda) -> None:
    one, two = cuda.allocate(512, "one"), cuda.allocate(512, "two")
    with pytest.raises(BundleError, match="CUDA refuses cuMemcpy3DAsync: CUDA_ERROR_INVALID_VALUE"):
        cuda.copy(Copy(one, two, 64, height=2, source_pitch=63, target_pitch=64))


def test_work_that_fails_while_it_is_captured_leaves_the_stream_as_it_was(cuda: Cuda, driver: FakeDriver) -> None:
    place, queued = cuda.allocate(512, "one"), cuda.queued

    def work() -> None:
        cuda.clear(place, 512)
        raise BundleError("no")

    with pytest.raises(BundleError, match="no"):
        cuda.capture(work)
    assert driver.capturing is None and cuda.queued == queued and not driver.graphs
    cuda.launch(cuda.capture(lambda: cuda.clear(place, 512)))
    cuda.synchronize()
    assert not driver.at(place, 512).any()
