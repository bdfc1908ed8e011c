"""The decode graph: onnxruntime's own operators where onnxruntime runs the bundle, standard ONNX elsewhere, and the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests._tiny import TEXT_ONLY, write_recipe
from tests.families._small import DecoderName, save_small_llava, save_small_qwen2_vl
from tmc_export.api import build
from tmc_export.bundle.program import Program
from tmc_export.bundle.read import open_manifest
from tmc_export.passes import attend_by_key
from tmc_export.passes.attend_by_key import AttendByKeyPass
from tmc_export.runtime._backend import BackendOptions, Graph, open_backend, options_for
from tmc_export.runtime._decoder import Decoder
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend
from tmc_export.runtime._token_rows import TokenRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

FUSED, ROTATED, SKIPPED, DECODE = "GroupQueryAttention", "RotaryEmbedding", "SkipSimplifiedLayerNormalization", "onnx/block_0_decode.onnx"
SHARING: dict[str, dict[str, int]] = {FUSED: {}, ROTATED: {"hidden": 192, "heads": 12}}
"""Operator → a decoder that gets it: 2 and 6 query heads per KV head, 36 visual tokens in 54 slots."""
PICTURE = TEXT_ONLY.replace("images: 0, text_tokens: 32, new_tokens: 16", "images: 1, text_tokens: 9, new_tokens: 9")
ELSEWHERE = PICTURE.replace("{device: cpu, runtime: onnxruntime}", "{device: rtx-4090, runtime: tensorrt-rtx}")


@pytest.fixture(autouse=True, scope="module")
def few_slots() -> Iterator[None]:
    """Small models have too few slots for rows of a key to pay."""
    with patch.object(attend_by_key, "LEAST_SLOTS", 54):
        yield


def built(folder: Path, text: str = PICTURE, decoder: DecoderName = "qwen2", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    if not (folder / "model").exists():
        save_small_llava(folder / "model", decoder, layers=2, vision_layers=2, **options)
    name = "here" if text is not ELSEWHERE else "elsewhere"
    return build(write_recipe(folder, text), folder / name, record=False, engines=False).folder


def operators(bundle: Path, file: str = DECODE) -> list[str]:
    return [node.op_type for node in onnx.load(bundle / file, load_external_data=False).graph.node]


def opened(bundle: Path) -> tuple[Program, Graph]:
    program = open_manifest(bundle).program
    return program, open_backend("onnxruntime", bundle, BackendOptions(threads=1)).graph(program.blocks[0].phases["decode"].file)


def feed(program: Program, filled: int, position: int) -> dict[str, Array]:
    block, rng = program.blocks[0], np.random.default_rng(0)
    slots = block.capacity
    past = {
        f"past_key_values.{i}.{kind}": rng.standard_normal((1, program.kv_heads, slots, program.head_dim)).astype(np.float32)
        for i in range(block.first, block.last)
        for kind in ("key", "value")
    }
    order = np.arange(slots, dtype=np.int64)
    return {
        "hidden": rng.standard_normal((1, 1, program.width)).astype(np.float32),
        "positions": np.full((1, 1, 1), position),
        "order": np.full((1, 1), slots),
        "valid": np.ones((1, 1), np.bool_),
        "past_order": order[None],
        "past_valid": (order < filled)[None],
        "last": np.zeros(1, np.int64),
        **past,
    }


@pytest.fixture(scope="module", params=list(SHARING))
def operator(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, operator: str) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("decode")
    return built(folder, **SHARING[operator]), built(folder, ELSEWHERE, **SHARING[operator])


def test_only_the_decode_graph_of_onnxruntime_has_its_operators(both: tuple[Path, Path], operator: str) -> None:
    here, elsewhere = both
    assert [operators(here).count(one) for one in SHARING] == [2 * (own == operator) for own in SHARING]
    assert operators(here).count("Attention") == operators(here).count("ScatterND") // 2 == 2 * (operator == ROTATED)
    assert "Softmax" not in operators(here) and operators(here).count(SKIPPED) == 4 and operators(here).count("Sqrt") == 1
    own = {*SHARING, SKIPPED, "Attention"}
    assert not own & {*operators(elsewhere)} and operators(elsewhere).count("Softmax") == 2
    for file in ("onnx/block_0_prefill.onnx", "onnx/block_0_chunk.onnx", "engines/block_0.onnx"):
        assert not own & {*operators(here, file)}
    model = onnx.load(here / DECODE, load_external_data=False)
    newer = ({o.domain: o.version for o in model.opset_import}[""], model.ir_version)
    assert (newer >= (23, 11)) == (operator == ROTATED)


def test_rows_of_a_key_are_only_for_heads_that_share_and_slots_that_pictures_fill(tmp_path: Path) -> None:
    """A slot more, or a query head less per key, and onnxruntime's one operator is in its place."""
    fewer = PICTURE.replace("new_tokens: 9", "new_tokens: 10")
    assert fewer != PICTURE and operators(built(tmp_path / "fewer", fewer, **SHARING[ROTATED])).count(FUSED) == 2
    with patch.object(attend_by_key, "LEAST_SLOTS", 55):
        assert operators(built(tmp_path / "slots", **SHARING[ROTATED])).count(FUSED) == 2
    assert operators(built(tmp_path / "five", hidden=160, heads=10)).count(FUSED) == 2


@pytest.mark.parametrize("filled", [0, 1, 17, 53])
@pytest.mark.parametrize("position", [3, 1000])
def test_both_give_the_same(both: tuple[Path, Path], filled: int, position: int) -> None:
    (program, fused), (_, plain) = opened(both[0]), opened(both[1])
    assert program.blocks[0].capacity == 54  # 53: the token takes the last slot
    x = feed(program, filled, position)
    got, want = fused.run(x), plain.run(x)
    assert set(got) == set(want) >= {"logits", "present.0.key", "present.1.value"}
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=2e-5, err_msg=name)
    other = fused.run(feed(program, filled, position + 1))
    assert np.abs(other["present.0.key"] - want["present.0.key"]).max() > 1e-3  # another position is another rotation
    if filled:
        assert np.abs(fused.run(feed(program, filled - 1, position))["logits"] - want["logits"]).max() > 1e-4  # a slot less is seen


@pytest.mark.parametrize("which", [0, 1], ids=["fused", "standard"])
def test_a_step_writes_the_row_and_nothing_else(both: tuple[Path, Path], which: int) -> None:
    program, graph = opened(both[which])
    x = feed(program, 20, 33)
    before = {name: array.copy() for name, array in x.items()}
    want = graph.run(x)
    for name, array in before.items():
        np.testing.assert_array_equal(x[name], array, err_msg=name)  # `run` leaves its inputs alone
    got = graph.step(x, ()).arrays
    assert "present.0.key" not in got
    np.testing.assert_array_equal(got["logits"], want["logits"])
    for name in (n for n in x if n.startswith("past_key_values.")):
        before[name][:, :, 20] = want[name.replace("past_key_values", "present")][:, :, 0]
        np.testing.assert_array_equal(x[name], before[name], err_msg=name)
    again = graph.step({**x, "past_valid": (np.arange(x["past_valid"].shape[1]) < 21)[None]}, ()).arrays
    assert np.abs(again["logits"] - want["logits"]).max() > 1e-4
    assert again["logits"] is got["logits"]  # a step's arrays are the next step's


def test_the_decoders_logits_are_not_overwritten(both: tuple[Path, Path]) -> None:
    """What `step` returns stays what it was, and equals what a decoder of its own returns for the same tokens."""
    program = open_manifest(both[0]).program
    seen: list[np.ndarray] = []
    for _ in range(2):
        decoder = Decoder(program, OnnxRuntimeBackend(both[0], BackendOptions(threads=1)))
        returned = [decoder.step(token) for token in (3, 4, 5)]
        seen.append(np.stack(returned))
        assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(returned, 2))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(seen[0], 2))
    passing = [decoder.step(token, keep=False) for token in (3, 4)]
    assert np.shares_memory(*passing)  # who does not keep them is spared a copy


def test_a_bundles_token_table_is_read_without_a_session(both: tuple[Path, Path]) -> None:
    for bundle in both:
        program = open_manifest(bundle).program
        backend = open_backend("onnxruntime", bundle, options_for(program, 1))
        kinds = {phase: isinstance(backend.graph(spec.file), TokenRows) for phase, spec in program.embed.items()}
        assert kinds == {"prefill": False, "chunk": False, "decode": True}


def test_axes_of_positions_keep_their_own_angles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-VL: a cosine's halves are mixed of three axes, so that the half is cut out of it."""
    monkeypatch.setattr(attend_by_key, "LEAST_SLOTS", 16)
    monkeypatch.setattr(AttendByKeyPass.__init__, "__defaults__", (2, Fraction(0), None))
    save_small_qwen2_vl(tmp_path / "model", layers=2, vision_layers=2)
    bundles = []
    for name, text in (("here", PICTURE), ("elsewhere", ELSEWHERE)):
        recipe = write_recipe(tmp_path, text.replace("text_tokens: 9", "text_tokens: 20"))
        bundles.append(build(recipe, tmp_path / name, record=False, engines=False).folder)
    assert operators(bundles[0]).count(ROTATED) == operators(bundles[0]).count("Attention") == 2
    (program, fused), (_, plain) = (opened(bundle) for bundle in bundles)
    x = feed(program, 12, 3) | {"positions": np.array([3, 50, 700]).reshape(3, 1, 1)}
    got, want = fused.run(x), plain.run(x)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=2e-5, err_msg=name)
    for axis in range(3):
        moved = x["positions"].copy()
        moved[axis] += 1
        assert np.abs(fused.run({**x, "positions": moved})["present.0.key"] - want["present.0.key"]).max() > 1e-3


def test_graphs_that_round_activations_keep_products(tmp_path: Path) -> None:
    """onnxruntime 1.23 has no QuantizeLinear of Attention's opset; the numbers are the same."""
    _, plain = opened(built(tmp_path, ELSEWHERE, **SHARING[ROTATED]))
    with patch.object(attend_by_key, "_ROUNDING", "Split"):  # as if it were one that rounds
        bundle = built(tmp_path, **SHARING[ROTATED])
    model = onnx.load(bundle / DECODE, load_external_data=False)
    assert {o.domain: o.version for o in model.opset_import}[""] < 23
    found = [node.op_type for node in model.graph.node]
    assert [found.count(one) for one in (ROTATED, FUSED, "Attention", "Softmax")] == [2, 0, 0, 2]
    program, graph = opened(bundle)
    for filled in (1, 53):
        x = feed(program, filled, 3)
        got, want = graph.run(x), plain.run(x)
        for name, array in want.items():
            np.testing.assert_allclose(got[name], array, rtol=0, atol=2e-5, err_msg=name)


def test_a_bias_joins_its_int4_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would make a Gemm of both, between two Reshapes, and older ones would widen its codes in every run."""
    bundle = built(tmp_path, PICTURE.replace("quantize: {}", "quantize: {decoder: {weights: int4, block: 32}}"))
    opened, path = ort.InferenceSession, bundle / "onnx/optimized.onnx"

    def dumped(model: str, options: ort.SessionOptions, **more: Any) -> ort.InferenceSession:
        options.optimized_model_filepath = str(path)
        return opened(model, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", dumped)
    program = open_manifest(bundle).program
    for options, joined in ((options_for(program, 1), True), (BackendOptions(1), False)):
        open_backend("onnxruntime", bundle, options).graph(DECODE)
        nodes = list(onnx.load(path, load_external_data=False).graph.node)
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        flattened = sum(node.op_type == "Reshape" for node in nodes)
        fused = len(products) == 10 and sum(len(node.input) == 6 for node in products) == 2
        assert len(products) >= 8  # 1.23 leaves the products with a bias as they are when it is not told
        assert (fused and flattened < 4) if joined else (not fused or flattened >= 4)


@pytest.mark.parametrize(("decoder", "options"), [("mistral", {"window": 12}), ("qwen3", {})])
def test_what_the_operator_cannot_do_stays_standard(tmp_path: Path, decoder: DecoderName, options: dict[str, Any]) -> None:
    assert not {*SHARING, "Attention"} & {*operators(built(tmp_path, decoder=decoder, **SHARING[ROTATED], **options))}


def test_blocks_behind_cuts_choose_for_themselves(tmp_path: Path) -> None:
    """Before FastV's cut pictures fill the slots, behind it text does; a Llama: no bias. The bundle gives the reference's answers."""
    save_small_llava(tmp_path / "model", "llama", layers=3, vision_layers=2, **SHARING[ROTATED])
    recipe = PICTURE.replace("compress: []", "compress:\n  - {at: decoder.2, method: fastv, keep: 4}")
    bundle = build(write_recipe(tmp_path, recipe), tmp_path / "bundle", engines=False).folder
    before, behind = (operators(bundle, f"onnx/block_{index}_decode.onnx") for index in (0, 1))
    assert (before.count(ROTATED), before.count(FUSED)) == (2, 0) and (behind.count(ROTATED), behind.count(FUSED)) == (0, 1)
    tight = PICTURE.replace("runtime: onnxruntime}", "runtime: onnxruntime, memory_tight: true}")
    assert tight != PICTURE and operators(built(tmp_path / "tight", tight, **SHARING[ROTATED])).count(FUSED) == 2
