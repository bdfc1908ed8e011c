"""Whole conversations through the TensorRT backend, on a made-up driver and a made-up TensorRT. *Nothing here ran on a GPU.*

What the made-up device computes is what onnxruntime computes, bit for bit, so that everything the backend moves has to arrive. What a
device leaves undefined (addresses outside, memory freed or not written, copies that overlap) is a `Fault` there.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.runtime._device import CASES, Said, build_case, device, opened, pictures, talk  # noqa: E402
from tests.runtime._fake_cuda import Call, FakeDriver, Fault  # noqa: E402
from tmc_export.runtime._backend import Held  # noqa: E402
from tmc_export.runtime._cuda import Cuda  # noqa: E402
from tmc_export.runtime._device import DeviceSlots, DeviceTensor  # noqa: E402
from tmc_export.runtime._engine_graph import EngineGraph  # noqa: E402
from tmc_export.runtime.session import Session  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture
def case(request: pytest.FixtureRequest, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, built once."""
    if request.param not in bundles:
        bundles[request.param] = build_case(request.param, tmp_path_factory.mktemp(request.param))
    return bundles[request.param]


@pytest.fixture
def fastv(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "fastv" not in bundles:
        bundles["fastv"] = build_case("fastv", tmp_path_factory.mktemp("fastv"))
    return bundles["fastv"]


def told(bundle: Path, driver: FakeDriver, rtx: bool = True) -> tuple[Said, Session]:
    """A conversation on the device; the session stays open."""
    with device(driver, rtx=rtx):
        session = opened(bundle, "tensorrt-rtx" if rtx else "tensorrt")
    return talk(session), session


def expect_same(got: Said, want: Said) -> None:
    assert got.tokens == want.tokens and got.kept == want.kept
    assert len(got.logits) == len(want.logits) > 10
    for mine, theirs in zip(got.logits, want.logits, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("case", "tolerance"), [(name, c.tolerance) for name, c in CASES.items()], indirect=["case"], ids=CASES)
def test_a_conversation_is_that_of_the_same_graphs_on_arrays(case: Path, tolerance: float) -> None:
    """Tokens, kept tokens and every logit, bit for bit; then the slots that both are left with; then onnxruntime's own graphs, which
    compute in another order."""
    arrays = opened(case, "arrays")
    want = talk(arrays)
    driver = FakeDriver()
    got, session = told(case, driver)
    expect_same(got, want)
    session._backend._shared.cuda.synchronize()  # type: ignore[attr-defined]
    for mine, theirs in zip(session.decoder.slots, arrays.decoder.slots, strict=True):
        assert mine.used == theirs.used > 0 and mine.order.tolist() == theirs.order.tolist()
        for layer in range(mine.block.first, mine.block.last):
            np.testing.assert_array_equal(fetch(driver, mine.key(layer))[:, :, : mine.used], theirs.key(layer)[:, :, : mine.used])  # type: ignore[index]
    plain = talk(opened(case, "onnxruntime"))
    assert got.tokens == plain.tokens and got.kept == plain.kept
    for one, other in zip(got.logits, plain.logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def fetch(driver: FakeDriver, held: Held) -> np.ndarray:
    assert isinstance(held, DeviceTensor)
    return driver.at(held.address, held.nbytes).view(held.dtype).reshape(held.shape)


@pytest.mark.parametrize("case", ["codes", "fp8"], indirect=True)
def test_codes_are_bound_where_the_slots_lie(case: Path) -> None:
    """Codes, int8 or bytes of fp8, are no integers that the host writes: slots would be uploaded with each token."""
    _, session = told(case, FakeDriver())
    graphs = session._backend._graphs.values()  # type: ignore[attr-defined]
    slots = {n for g in graphs if isinstance(g, EngineGraph) for n in g.inputs if n.startswith(("past_key", "key.", "next_key."))}
    assert len(slots) == 2 * 4 + 2 and not slots & {n for g in graphs if isinstance(g, EngineGraph) for n in (*g._inputs.views, *g._own)}


def test_standard_tensorrt_has_no_runtime_configuration_and_answers_the_same(fastv: Path, tmp_path: Path) -> None:
    import shutil

    from tests.runtime._fake_tensorrt import place_engines

    bundle = Path(shutil.copytree(fastv, tmp_path / "bundle"))
    place_engines(bundle, "tensorrt", "10.3.0.30", ())
    with device(FakeDriver(capability=(8, 7)), "10.3.0.30", rtx=False):
        expect_same(talk(opened(bundle, "tensorrt")), talk(opened(fastv, "arrays")))


# ------------------------------------------------------------------------------------------------------ what is called
def test_engines_are_read_once_and_have_a_context_per_profile(fastv: Path) -> None:
    driver = FakeDriver()
    _, session = told(fastv, driver)
    read, contexts = names(driver, "deserialize"), [c.arguments[0] for c in driver.calls if c.name == "context"]
    assert len(read) == 4, "vision, two blocks, one cut"
    assert sorted(contexts) == ["block_0"] * 3 + ["block_1"] * 3 + ["compress_1", "vision_0"]
    loaded = len(driver.calls)
    talk(session)
    assert not {c.name for c in driver.calls[loaded:]} & {"deserialize", "context", "cuMemAlloc", "cuMemHostAlloc", "cuMemFree"}, (
        "a second conversation makes nothing anew"
    )


def names(driver: FakeDriver, *wanted: str) -> list[str]:
    return [c.name for c in driver.calls if c.name in wanted]


def steps(driver: FakeDriver, session: Session, count: int) -> list[list[Call]]:
    """The calls of single tokens behind a picture's turn."""
    session.reset()
    session.turn(pictures(1), "what", max_new_tokens=1)
    found = []
    for token in range(40, 40 + count):
        before = len(driver.calls)
        session.decoder.step(token)
        found.append(driver.calls[before:])
    return found


def test_a_step_is_a_launch_and_a_copy_per_block(fastv: Path) -> None:
    driver = FakeDriver()
    with device(driver):
        session = opened(fastv, "tensorrt-rtx")
    first, second, *later = steps(driver, session, 6)
    assert "cuStreamBeginCapture" not in [c.name for c in first], "the first run settles what cannot be captured"
    assert [c.name for c in second].count("cuGraphInstantiate") == 2
    for calls in later:
        assert [c.name for c in calls] == ["cuGraphLaunch", "copy", "cuGraphLaunch", "cuStreamSynchronize", "copy"]
    graphs = {handle: work for handle, work in driver.launched}
    assert len(graphs) == 2 and len(driver.launched) == 2 * 5
    for work in graphs.values():
        assert [w.name for w in work].count("execute") == 1
    captured = [c for c in second if c.captured]
    assert [c.name for c in captured] == ["upload", "upload", "execute", "upload", "execute", "download"], (
        "the first block gets the token's row from the host, the second one the first one's output where it lies"
    )
    plain = [c for c in first if c.name in ("upload", "execute", "download")]
    assert [(c.name, c.arguments) for c in captured] == [(c.name, c.arguments) for c in plain], "the same addresses"


def test_the_graphs_of_a_later_conversation_are_those_captured(fastv: Path) -> None:
    driver = FakeDriver()
    with device(driver):
        session = opened(fastv, "tensorrt-rtx")
    steps(driver, session, 4)
    before = {handle for handle, _ in driver.launched}
    steps(driver, session, 4)
    assert {handle for handle, _ in driver.launched} == before and names(driver, "cuGraphInstantiate") == ["cuGraphInstantiate"] * 2


def test_slots_and_what_passes_between_graphs_never_cross_over(fastv: Path) -> None:
    """Uploads: integers in one piece per run, the first block's hidden states, pixels. Downloads: what the host reads."""
    driver = FakeDriver()
    _, session = told(fastv, driver)
    slots = [t for s in session.decoder.slots for t in s.feed().values() if isinstance(t, DeviceTensor)]
    assert len(slots) == 8
    uploads = [c for c in driver.calls if c.name == "upload"]
    for call in uploads:
        target, _, size = call.arguments
        assert not any(target < t.address + t.nbytes and t.address < target + size for t in slots)
    runs = [c for c in driver.calls if c.name == "execute" and not c.captured]
    between = driver.calls.index(runs[1]), driver.calls.index(runs[2])  # vision, block 0, [compress]
    assert [c.name for c in driver.calls[between[0] + 1 : between[1]] if c.name in ("upload", "download")] == ["upload"], (
        "integers of the cut"
    )
    per_run: list[list[Any]] = [[]]
    for call in driver.calls:
        if call.name == "upload":
            per_run[-1].append(call.arguments[0])
        elif call.name == "execute":
            per_run.append([])
    assert all(len(set(targets)) == len(targets) <= 2 for targets in per_run), "nothing is uploaded twice for a run"


def test_what_is_appended_is_one_copy_for_all_layers_and_heads(fastv: Path) -> None:
    driver = FakeDriver()
    with device(driver):
        session = opened(fastv, "tensorrt-rtx")
    block = session.decoder.slots[0]
    first = block.feed()["past_key_values.0.key"]
    assert isinstance(first, DeviceTensor)
    (*_, calls) = steps(driver, session, 4)
    target, _, width, height, depth = next(c for c in calls if c.name == "copy").arguments
    row = session.program.head_dim * 4
    assert (width, height, depth) == (row, session.program.kv_heads, 4), "one row, each head, keys and values of two layers"
    assert target == first.address + (block.used - 1) * row, "behind the rows that were there"


def test_everything_is_given_back(fastv: Path) -> None:
    driver = FakeDriver()
    _, session = told(fastv, driver)
    session._backend.close()  # type: ignore[attr-defined]
    assert all(a.freed for a in (*driver.allocations, *driver.pinned)) and not driver.streams
    assert names(driver, "cuDevicePrimaryCtxRelease") == ["cuDevicePrimaryCtxRelease"]


# ------------------------------------------------------------------------------------------------------------ capture
@pytest.mark.parametrize("reason", ["driver", "tensorrt"])
def test_a_capture_that_fails_is_said_once_and_the_answers_stay(fastv: Path, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(captures=reason != "driver")
    with device(driver):
        session = opened(fastv, "tensorrt-rtx")
    if reason == "tensorrt":
        for phase in (b.phases["decode"].file for b in session.program.blocks):
            monkeypatch.setattr(session._backend.graph(phase)._context, "is_stream_capturable", lambda stream: False)  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        got = talk(session)
    assert [str(w.message) for w in heard if "CUDA graph" in str(w.message)] == [str(heard[0].message)]
    assert "block_0_decode" in str(heard[0].message) and "queued anew" in str(heard[0].message)
    assert not driver.launched
    expect_same(got, talk(opened(fastv, "arrays")))


def test_scratch_memory_that_moves_is_captured_anew(fastv: Path) -> None:
    driver = FakeDriver()
    with device(driver):
        session = opened(fastv, "tensorrt-rtx")
    steps(driver, session, 3)
    before = {handle for handle, _ in driver.launched}
    shared = session._backend._shared  # type: ignore[attr-defined]
    shared.need(shared.scratch_bytes + 1)
    driver.launched.clear()
    want = opened(fastv, "arrays")
    expect_same(talk(session), talk(want))
    assert driver.launched and not before & {handle for handle, _ in driver.launched}


def test_a_turn_that_is_interrupted_leaves_the_device_as_it_was(fastv: Path) -> None:
    driver = FakeDriver()
    with device(driver):
        session = opened(fastv, "tensorrt-rtx")

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    session.turn(pictures(1), "what is it", max_new_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        session.turn(pictures(1), "and this", max_new_tokens=3, on_text=interrupt)
    again = session.turn((), "and where", max_new_tokens=3)
    want = opened(fastv, "arrays")
    want.turn(pictures(1), "what is it", max_new_tokens=3)
    assert again.tokens == want.turn((), "and where", max_new_tokens=3).tokens


# --------------------------------------------------------------------------------------------------- it would be found
def test_a_row_written_one_slot_off_is_found(fastv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = DeviceSlots.append
    monkeypatch.setattr(DeviceSlots, "append", lambda self, present, start, count: append(self, present, start + (count == 1), count))
    got, _ = told(fastv, FakeDriver())
    with pytest.raises(AssertionError):
        expect_same(got, talk(opened(fastv, "arrays")))


@pytest.mark.parametrize(
    ("broken", "says"),
    [("past the end", "leave their allocation"), ("unaligned", "not aligned"), ("no wait", "was written before"),
     ("no zeros", "nobody wrote"), ("freed", "memory is freed"), ("shared", "share memory")],
)  # fmt: skip
def test_faults_are_found(fastv: Path, monkeypatch: pytest.MonkeyPatch, broken: str, says: str) -> None:
    """Each of these is one line of the backend, taken away or moved."""
    driver = FakeDriver()
    if broken == "past the end":
        allocate = Cuda.allocate
        monkeypatch.setattr(Cuda, "allocate", lambda self, size, what: allocate(self, size - 256 if "KV slots" in what else size, what))
    if broken == "unaligned":
        monkeypatch.setattr("tmc_export.runtime._engine_graph.aligned", lambda size: max(size, 8))
    if broken == "no wait":
        monkeypatch.setattr(Cuda, "wait", lambda self, mark: None)
    if broken == "no zeros":
        monkeypatch.setattr(Cuda, "clear", lambda self, target, size: None)
    if broken == "shared":
        monkeypatch.setattr("tmc_export.runtime._engine_graph.stride_of", lambda shape, itemsize: 256)
    with pytest.raises(Fault, match=says):
        if broken == "freed":
            _, session = told(fastv, driver)
            backend: Any = session._backend
            backend._shared.cuda.synchronize()
            backend._shared.cuda.free(session.decoder.slots[0].key(0).address)  # type: ignore[attr-defined]
            session.turn((), "and", max_new_tokens=2)
        else:
            told(fastv, driver)


def test_a_hidden_row_of_the_wrong_token_is_found(fastv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding row of a wide decode step in the place of the token's own."""
    feed = EngineGraph._feed

    def swapped(self: EngineGraph, given: Any, pad: bool) -> Any:
        if pad and "hidden" in given and isinstance(given["hidden"], np.ndarray):
            given = {**given, "hidden": np.concatenate([np.zeros_like(given["hidden"]), given["hidden"]], 1)}
        return feed(self, given, pad)

    monkeypatch.setattr(EngineGraph, "_feed", swapped)
    got, _ = told(fastv, FakeDriver())
    with pytest.raises(AssertionError):
        expect_same(got, talk(opened(fastv, "arrays")))
