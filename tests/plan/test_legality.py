"""Wrong plans: each ends in an error that names file, line, column, the reason and the fix. Good twins are not refused. Plans of
`quantize`: `test_quantize_legality.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests._sequence_methods import sequence_methods
from tests.plan._wrong import Wrong, check_refusal, refused
from tests.plan.conftest import TINY, Writer
from tmc_export.core.errors import LegalityError, RecipeError
from tmc_export.engine.options import RTX_CAPABILITIES as ENGINE_CAPABILITIES
from tmc_export.families._contract import ModelFiles
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import (
    Attention,
    Features,
    Keys,
    Layout,
    Method,
    MethodConfig,
    Need,
    Positions,
    Segment,
    Site,
    Stage,
    TextEmbeds,
)
from tmc_export.plan.legality import RTX_CAPABILITIES, check_plan
from tmc_export.plan.make import make_plan
from tmc_export.plan.resolve import resolve
from tmc_export.plan.source import read_model_files

WRONG: list[Wrong] = [
    (
        "rtx runtime on a jetson",
        (),
        {"target": "device: jetson-agx-orin-64gb, runtime: tensorrt-rtx"},
        "6:49",
        ("cannot target 'jetson-agx-orin-64gb' (8.7)", "write runtime: tensorrt"),
    ),
    (
        "tensorrt on a desktop",
        (),
        {"target": "device: rtx-4090, runtime: tensorrt"},
        "6:37",
        ("not known for 'rtx-4090'", "tensorrt-rtx 1.7.1", "write runtime: tensorrt-rtx"),
    ),
    ("engines on a cpu", (), {"target": "device: cpu, runtime: tensorrt"}, "6:32", ("needs an NVIDIA GPU", "write runtime: onnxruntime")),
    ("rtx on a cpu", (), {"target": "device: cpu, runtime: tensorrt-rtx"}, "6:32", ("needs an NVIDIA GPU", "'cpu' has none")),
    (
        "bf16 on orin",
        (),
        {"model": "dtype: bfloat16"},
        "3:31",
        ("bfloat16 does not run on 'jetson-agx-orin-64gb'", "fp32, fp16, int8, int4"),
    ),
    (
        "bf16 graphs",
        (),
        {"model": "dtype: bfloat16", "target": "device: rtx-4090, runtime: tensorrt-rtx"},
        "3:31",
        ("not built yet", "write dtype: float16"),
    ),
    (
        "bf16 on 7.5",
        (),
        {"model": "dtype: bfloat16", "target": "device: rtx-4090, runtime: tensorrt-rtx, compute_capabilities: ['7.5', '8.9']"},
        "3:31",
        ("bfloat16 does not build for compute capability 7.5", "float16"),
    ),
    (
        "float32 on turing",
        (),
        {
            "model": "dtype: float32",
            "target": "device: rtx-4090, runtime: tensorrt-rtx, compute_capabilities: ['7.5', '8.9']",
        },
        "3:31",
        ("float32 does not build for compute capability 7.5", "write float16"),
    ),
    (
        "capability of a jetson",
        (),
        {"target": "device: rtx-4090, runtime: tensorrt-rtx, compute_capabilities: ['8.7', '8.9']"},
        "6:73",
        ("cannot build for compute capability '8.7'", "12.0"),
    ),
    (
        "capability of another card",
        (),
        {"target": "device: rtx-4090, runtime: tensorrt-rtx, compute_capabilities: ['12.0']"},
        "6:73",
        ("engines for 12.0 do not run on 'rtx-4090', which is 8.9", "add it"),
    ),
    (
        "no capability",
        (),
        {"target": "device: rtx-4090, runtime: tensorrt-rtx, compute_capabilities: []"},
        "6:73",
        ("compute_capabilities is empty",),
    ),
    (
        "capability without rtx",
        (),
        {"target": "device: cpu, runtime: onnxruntime, compute_capabilities: ['8.9']"},
        "6:67",
        ("has no effect with runtime: onnxruntime", "remove it"),
    ),
    ("batch", (), {"inputs": "text_tokens: 8, new_tokens: 8, batch: 2"}, "4:48", ("one conversation at a time", "batch: 1")),
    (
        "a projector method without pictures",
        ("at: projector, method: pool",),
        {"inputs": "images: 0, text_tokens: 8, new_tokens: 8"},
        "8:10",
        ("inputs.images is 0", "remove the entry"),
    ),
    ("a revision of a folder", (), {"model": "dtype: float16, revision: main"}, "3:50", ("revision: main has no effect", "remove it")),
    (
        "a picture rule without pictures",
        (),
        {"inputs": "images: 0, fit: resize, text_tokens: 8, new_tokens: 8"},
        "4:26",
        ("inputs.fit has nothing to act on", "remove it"),
    ),
    ("a cut past the end", ("at: decoder.32, method: fastv",), {}, "8:5", ("fastv at decoder.32", "decoder.31")),
    ("a cut before the start", ("at: decoder.0, method: fastv",), {}, "8:5", ("decoder.0", "decoder.1")),
    ("an encoder layer that does not run", ("at: encoder.23.mid, method: tome, r: 8",), {}, "8:5", ("0 to 22",)),
    ("an encoder layer behind the last", ("at: encoder.23, method: random, keep: 50%",), {}, "8:10", ("encoder.23", "the last is 22")),
    (
        "a stage per picture behind a joint one",
        ("at: decoder.2, method: fastv, keep: 50%, scope: joint", "at: decoder.4, method: fastv, keep: 50%"),
        {"inputs": "images: 2, text_tokens: 8, new_tokens: 8"},
        "9:5",
        ("decoder.4 comes after", "joint at decoder.2", "must be the last"),
    ),
    (
        "joint stages at several cuts",
        ("at: decoder.8, method: pyramiddrop, scope: joint",),
        {"inputs": "images: 2, text_tokens: 8, new_tokens: 8"},
        "8:49",
        ("pyramiddrop", "decoder.16 comes after"),
    ),
    ("keep more than arrives", ("at: decoder.2, method: fastv, keep: 577",), {}, "8:5", ("577", "576 visual tokens")),
    (
        "a pool after a selection",
        ("at: projector, method: random, keep: 50%", "at: projector, method: pool"),
        {},
        "9:5",
        ("pool needs a raster", "put pool first"),
    ),
    ("site of another method", ("at: projector, method: fastv",), {}, "8:10", ("'fastv' cannot act at projector", "decoder.<k>")),
    ("unbuilt site", ("at: decoder.2.mid, method: fastv",), {}, "8:10", ("cannot act at decoder.2.mid",)),
    ("too long for the model", (), {"inputs": "text_tokens: 3000, new_tokens: 1000"}, "4:9", ("4576 tokens", "made for 4096")),
    (
        "wrong picture size",
        (),
        {"inputs": "image_size: [224, 224], text_tokens: 8, new_tokens: 8"},
        "",
        ("[224, 224]", "image_size: [336, 336]"),
    ),
    (
        "kv of a block before another cut",
        ("at: decoder.2, method: fastv, keep: 50%", "at: decoder.4, method: tokencarve, keep: 25%"),
        {},
        "9:10",
        ("prunes the KV of layers 0 to 3", "'fastv' at decoder.2 cut between", "put it before that cut"),
    ),
]


@pytest.mark.parametrize(("name", "entries", "lines", "place", "says"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_plans(
    name: str, entries: tuple[str, ...], lines: dict[str, Any], place: str, says: tuple[str, ...], write: Writer, files: ModelFiles
) -> None:
    check_refusal(write(*entries, **lines), files, place, says)


@pytest.mark.parametrize(
    ("entries", "lines"),
    [
        ((), {}),
        ((), {"target": "device: rtx-4090, runtime: tensorrt-rtx, decode_width: 2, compute_capabilities: ['8.6', '8.9', '12.0']"}),
        ((), {"target": "device: cpu, runtime: onnxruntime", "model": "dtype: float32"}),
        (("at: projector, method: pool", "at: projector, method: random, keep: 50%"), {}),
        (("at: decoder.2, method: tokencarve, keep: 25%", "at: decoder.4, method: fastv, keep: 50%"), {}),
        (("at: encoder, method: visionzip",), {}),
        ((), {"inputs": "images: 0, text_tokens: 8, new_tokens: 8"}),
    ],
)
def test_good_twins(entries: tuple[str, ...], lines: dict[str, Any], write: Writer, files: ModelFiles) -> None:
    plan, splits = make_plan(write(*entries, **lines), files)
    assert plan.blocks[-1].last == 32 and splits == ()


def test_capabilities_are_the_engine_rooms() -> None:
    assert tuple("SM" + c.replace(".", "") for c in RTX_CAPABILITIES) == ENGINE_CAPABILITIES


def test_recipe_order_at_one_site(write: Writer, files: ModelFiles) -> None:
    plan = resolve(write("at: decoder.2, method: random, keep: 100", "at: decoder.2, method: fastv, keep: 50%"), files)
    other = resolve(write("at: decoder.2, method: fastv, keep: 50%", "at: decoder.2, method: random, keep: 100"), files)
    assert [(s.method, s.after.tokens) for s in plan.cuts[0].stages] == [("random", 100), ("fastv", 50)]
    assert [(s.method, s.after.tokens) for s in other.cuts[0].stages] == [("fastv", 288), ("random", 100)]


# --------------------------------------------------------------------------------- methods that no file of graphs/ is (yet)
class Probe(Method):
    """Asks for whatever a test sets, and keeps half."""

    name = "probe"
    sites = ("input", "encoder", "encoder.<l>", "encoder.<l>.mid", "projector", "decoder.<k>")
    needs: tuple[Need, ...] = ()
    positions: Positions = "keep"
    kv: Mapping[int, int] = {}

    @staticmethod
    def stages(at: Site, config: MethodConfig, facts: Any) -> tuple[Stage, ...]:
        return (Stage(at, Probe.needs),)

    @staticmethod
    def layout(stage: Stage, layout: Layout, config: MethodConfig, facts: Any) -> Layout:
        if stage.at.part == "input":
            return layout
        return Layout((Segment("visual", layout.tokens // 2),), layout.width, Probe.positions, Probe.kv)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    list(METHODS)
    monkeypatch.setitem(METHODS._items, "probe", Probe)
    return monkeypatch


@pytest.mark.parametrize(
    ("site", "need", "says"),
    [
        ("input", Keys(), "pixels only"),
        ("projector", Keys(), "class tokens dropped"),
        ("projector", Attention(rows="cls"), "class tokens dropped"),
        ("encoder", TextEmbeds(), "encoded by itself"),
        ("encoder", Attention(rows="last"), "class-token rows and column sums"),
        ("encoder.0", Keys(), "no layer before it"),
        ("encoder.3", Features(3), "features of layers below 3"),
        ("decoder.2", Keys(), "encoder sites have keys"),
        ("decoder.2", Features(-1), "encoder sites have keys"),
        ("decoder.2", Attention(rows="cls"), "no class token: attention rows are those of last, text, visual, window and all"),
        ("decoder.2", Attention(rows="all", heads="joined"), "a rotary embedding per head"),
        ("decoder.2", Attention(rows="visual"), "the visual rows as a sum only"),
        ("decoder.2", Attention(rows="window"), "a window is 1 to 704"),
        ("decoder.2", Attention(rows="window", window=705), "a window is 1 to 704"),
    ],
)
def test_needs_that_a_site_cannot_meet(
    probe: pytest.MonkeyPatch, site: str, need: Need, says: str, write: Writer, files: ModelFiles
) -> None:
    probe.setattr(Probe, "needs", (need,))
    text = str(refused(write(f"at: {site}, method: probe"), files))
    assert ":8:10: method 'probe' asks for" in text and says in text


@pytest.mark.parametrize(
    ("site", "need"),
    [
        ("encoder", Keys()),
        ("encoder.1", Attention(rows="cls")),
        ("encoder.0.mid", Keys()),
        ("decoder.2", Attention(rows="all")),
        ("decoder.2", Attention(rows="text", heads="none")),
        ("decoder.2", Attention(layer="next", rows="visual", row_sum=True, heads="max")),
        ("decoder.2", Attention(rows="window", window=704, logits=True)),
        ("encoder.3", Features(2)),
    ],
)
def test_needs_that_a_site_can_meet(probe: pytest.MonkeyPatch, site: str, need: Need, write: Writer, files: ModelFiles) -> None:
    probe.setattr(Probe, "needs", (need,))
    make_plan(write(f"at: {site}, method: probe"), files)


def test_truncated_positions(probe: pytest.MonkeyPatch, write: Writer, files: ModelFiles) -> None:
    """Truncated positions count places; three axes of rows and columns do not."""
    probe.setattr(Probe, "positions", "truncate")
    plan, _ = make_plan(write("at: decoder.2, method: probe"), files)
    assert plan.cuts[0].positions == "truncate"
    with pytest.raises(LegalityError, match="truncates positions, and this model's have 3 axes") as error:
        check_plan(write("at: decoder.2, method: probe"), replace(plan, rope_axes=3))
    assert ":8:10: method 'probe' at decoder.2" in str(error.value)


@pytest.mark.parametrize(
    ("at", "place", "says"),
    [
        ("projector", "8:5", "leaves 0 of 576 tokens, so that no decoder layer would see the picture"),
        ("decoder.0", "8:5", "leaves 0 of 576 tokens, so that no decoder layer would see the picture"),
    ],
)
def test_nothing_left_before_any_layer_saw_it(at: str, place: str, says: str, write: Writer, files: ModelFiles) -> None:
    with sequence_methods():
        text = str(refused(write(f"at: {at}, method: test_nothing"), files))
    assert f":{place}: method 'test_nothing' at {at} {says}" in text


def test_nothing_is_cut_behind_a_stage_that_leaves_nothing(write: Writer, files: ModelFiles) -> None:
    with sequence_methods():
        plan, _ = make_plan(write("at: decoder.3, method: test_nothing"), files)
        text = str(refused(write("at: decoder.3, method: test_nothing", "at: decoder.5, method: fastv"), files))
    assert ":9:10: method 'fastv' at decoder.5 gets 0 visual tokens: an earlier stage left none" in text
    assert (plan.cuts[0].visual_out, plan.cuts[0].tokens_out, plan.blocks[1].tokens) == (0, 128, 128)
    assert plan.blocks[1].capacity == 128 + 256


@pytest.mark.parametrize(
    ("entry", "inputs", "says"),
    [
        ("at: decoder.2, method: test_fuse", "", "only stand at decoder.0; use decoder.0"),
        ("at: decoder.0, method: test_fuse, asks: false", "", "does not ask for it; add TextEmbeds"),
        ("at: decoder.0, method: test_fuse", "images: 2, ", "inputs.images is 2; write scope: joint, or images: 1"),
    ],
)
def test_text_is_replaced_only_where_that_is_defined(entry: str, inputs: str, says: str, write: Writer, files: ModelFiles) -> None:
    with sequence_methods():
        text = str(refused(write(entry, inputs=f"{inputs}text_tokens: 64, new_tokens: 64"), files))
        assert ":8:10: method 'test_fuse' at decoder" in text and says in text
        make_plan(write("at: decoder.0, method: test_fuse"), files)
        make_plan(write("at: decoder.0, method: test_fuse, scope: joint", inputs="images: 2, text_tokens: 64, new_tokens: 64"), files)


@pytest.mark.parametrize(
    ("entries", "inputs", "place", "says"),
    [
        (("at: projector, method: test_barrier",), "images: 2, ", "8:10", "inputs.images is 2; write images: 1"),
        (
            ("at: projector, method: test_barrier", "at: decoder.2, method: fastv"),
            "",
            "8:10",
            "'fastv' cuts at decoder.2, where text would score hidden tokens",
        ),
        (
            ("at: projector, method: test_barrier", "at: projector, method: random, keep: 50%"),
            "",
            "9:5",
            "is behind the 2 tokens that hide the picture from the text and does not keep them",
        ),
    ],
)
def test_where_a_picture_may_be_hidden(
    entries: tuple[str, ...], inputs: str, place: str, says: str, write: Writer, files: ModelFiles
) -> None:
    with sequence_methods():
        text = str(refused(write(*entries, inputs=f"{inputs}text_tokens: 64, new_tokens: 64"), files))
        assert f":{place}: method" in text and says in text
        plan, _ = make_plan(write(entries[0]), files)
    assert plan.vision[0].barrier == 2 and all(b.since for b in plan.blocks)


@pytest.mark.parametrize(
    ("kv", "says"),
    [
        ({0: 10}, "of layer 0 of the block"),
        ({0: 10, 1: 11}, "equally many rows"),
        ({2: 10}, "have not run there"),
    ],
)
def test_kv_of_parts_of_blocks(probe: pytest.MonkeyPatch, kv: dict[int, int], says: str, write: Writer, files: ModelFiles) -> None:
    probe.setattr(Probe, "kv", kv)
    text = str(refused(write("at: decoder.2, method: probe"), files))
    assert text.split(": ", 1)[0].endswith(":8:10") and says in text


def test_whole_blocks_may_be_pruned(probe: pytest.MonkeyPatch, write: Writer, files: ModelFiles) -> None:
    probe.setattr(Probe, "kv", {0: 10, 1: 10})
    make_plan(write("at: decoder.2, method: probe"), files)


# ------------------------------------------------------------------------------------------------------- device files
def test_an_unknown_device(write: Writer, files: ModelFiles) -> None:
    with pytest.raises(RecipeError, match="jetson-orin-nano-8gb"):
        make_plan(write(target="device: jetson-orin-nano, runtime: tensorrt"), files)


def test_the_small_model_is_legal_on_every_device(write: Writer) -> None:
    tiny = read_model_files(TINY)
    for device, runtime in (("cpu", "onnxruntime"), ("rtx-a2000-laptop", "tensorrt-rtx"), ("jetson-orin-nano-8gb", "tensorrt")):
        recipe = write(
            "at: decoder.2, method: fastv",
            inputs="text_tokens: 32, new_tokens: 16",
            target=f"device: {device}, runtime: {runtime}",
            source=TINY,
        )
        plan, _ = make_plan(recipe, tiny)
        assert replace(plan, name="x") == replace(resolve(recipe, tiny), name="x")
