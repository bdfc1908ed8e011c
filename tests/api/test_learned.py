"""Learned methods end to end: bound from a file or a seed, built, run, and found when their weights are other ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import onnx  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from tests._learned import registered, save_weights  # noqa: E402
from tests._tiny import listing, save_tiny_model, tmc  # noqa: E402
from tests.families._small import save_small_qwen2_5_vl, save_small_qwen2_vl  # noqa: E402
from tmc_export.api import build  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.bundle.write import hash_file, seal  # noqa: E402
from tmc_export.core.errors import ModelError, ParityError  # noqa: E402
from tmc_export.plan.resolve import resolve  # noqa: E402
from tmc_export.plan.source import read_model_files  # noqa: E402
from tmc_export.recipe import load_recipe  # noqa: E402
from tmc_export.runtime._backend import BackendOptions  # noqa: E402
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend  # noqa: E402
from tmc_export.verify.ladder import climb, recorded_ladder  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

TINY_LLAVA = Path(__file__).parents[2] / "examples" / "tiny-llava"
REPLACE = "{at: projector.replace, method: learned, into: encoder, step: 2, weights: WEIGHTS}"
RANDOM = "{random: 5}"
SITES = {
    "replace": REPLACE,
    "grown": "{at: projector.replace, method: learned, into: encoder, step: 2, extra: 3, weights: WEIGHTS}",
    "encoder": "{at: encoder.0, method: learned, into: encoder, out: encoder, step: 2, weights: WEIGHTS}",
    "projector": "{at: projector, method: learned, step: 1, extra: 2, weights: WEIGHTS}",
    "decoder": "{at: decoder.1, method: learned, step: 2, weights: WEIGHTS}",
}
QUICK = ("grown", "decoder")


@pytest.fixture(scope="module", autouse=True)
def _method() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaVA whose encoder (48 channels) is wider than its decoder (32); 9 visual tokens."""
    place = tmp_path_factory.mktemp("learned")
    save_tiny_model(place / "model")
    return place


def write(folder: Path, entries: str, dtype: str = "float32", model: str = "./model", images: str = "images: 1", name: str = "r") -> Path:
    lines = ["recipe: 1", "name: learned", f"model: {{source: {model}, dtype: {dtype}}}"]
    lines += [f"inputs: {{{images}, text_tokens: 24, new_tokens: 12, chunk: 8}}", "compress:", *(f"  - {e}" for e in entries.splitlines())]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join([*lines, "target: {device: cpu, runtime: onnxruntime}", ""]), "utf-8")
    return path


def initializers(bundle: Path, graph: str) -> dict[str, np.ndarray]:
    model = onnx.load(bundle / "onnx" / graph)
    return {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}


# -------------------------------------------------------------------------------------------------------- build and verify
@pytest.fixture(scope="module")
def bundles(folder: Path) -> Callable[..., Path]:
    """`bundles("decoder", "{random: 5}")` → a bundle, built once; building plays the recorded conversations."""
    made: dict[tuple[str, ...], Path] = {}

    def make(site: str, weights: str = RANDOM, dtype: str = "float32") -> Path:
        key = (site, weights, dtype)
        if key not in made:
            recipe = write(folder, SITES[site].replace("WEIGHTS", weights), dtype, name=f"r{len(made)}")
            made[key] = build(recipe, folder / f"bundle{len(made)}").folder
        return made[key]

    return make


@pytest.mark.parametrize("site", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SITES])
def test_every_site_climbs_the_ladder(bundles: Callable[..., Path], folder: Path, site: str) -> None:
    bundle = bundles(site)
    ladder = climb(bundle, folder / "model", steps=4)
    assert ladder.passed, ladder.text()
    per_subgraph = next(r for r in ladder.rungs if r.name == "onnxruntime per subgraph")
    assert per_subgraph.status == "passed"
    graph = "compress_1.onnx" if site == "decoder" else "vision_0.onnx"
    assert any(c.subgraph == f"onnx/{graph}" for c in per_subgraph.checks)


@pytest.mark.parametrize("site", ["replace", pytest.param("decoder", marks=pytest.mark.slow)])
def test_float16(bundles: Callable[..., Path], folder: Path, site: str) -> None:
    bundle = bundles(site, dtype="float16")
    assert climb(bundle, folder / "model", steps=4).passed
    graph = "compress_1.onnx" if site == "decoder" else "vision_0.onnx"
    kinds = {v.dtype for n, v in initializers(bundle, graph).items() if "learned" in n}
    assert kinds == {np.dtype(np.float16)}


def test_the_familys_projector_is_not_in_the_bundle(bundles: Callable[..., Path]) -> None:
    names = initializers(bundles("replace"), "vision_0.onnx")
    assert any(n.startswith("learned.0.") for n in names) and not any("multi_modal_projector" in n for n in names)
    assert any(n.startswith("projector.") for n in initializers(bundles("decoder"), "vision_0.onnx"))


def test_learned_tokens_are_counted(bundles: Callable[..., Path]) -> None:
    manifest = open_manifest(bundles("grown"))
    assert manifest.program.vision[0].tokens == 8 and manifest.program.blocks[0].tokens == 8 + 24  # of 9 patches every second, and 3


# ------------------------------------------------------------------------------------------------------------ from a file
def test_a_file_is_bound_hashed_and_found_again(bundles: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    facts = resolve(load_recipe(write(folder, REPLACE.replace("WEIGHTS", RANDOM), name="facts")), read_model_files(folder / "model")).facts
    save_weights(folder / "w.safetensors", facts, "mm.", seed=5, into="encoder")
    bundle = bundles("replace", "{file: w.safetensors, prefix: mm.}")
    manifest = open_manifest(bundle)
    assert manifest.weights == {"w.safetensors": hash_file(folder / "w.safetensors")}
    assert str(folder) not in (bundle / "manifest.json").read_text("utf-8")
    # The same numbers from the seed and from the file: the same graph.
    seeded, read = (initializers(bundles("replace", w), "vision_0.onnx") for w in (RANDOM, "{file: w.safetensors, prefix: mm.}"))
    assert seeded.keys() == read.keys() and all(np.array_equal(seeded[n], read[n]) for n in seeded)
    assert climb(bundle, folder / "model", steps=2, recipe_folder=folder).passed
    with pytest.raises(ModelError, match=r"w\.safetensors, whose weights the bundle's 'learned' has; give the recipe's folder"):
        climb(bundle, folder / "model", steps=2, recipe_folder=tmp_path)
    shutil.copyfile(folder / "w.safetensors", tmp_path / "w.safetensors")
    tensors = load_file(tmp_path / "w.safetensors")
    tensors["mm.norm.weight"] *= 1.1
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="is not the file of learned weights that the bundle was made from"):
        climb(bundle, folder / "model", steps=2, recipe_folder=tmp_path)


def test_another_file_is_another_bundle(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(folder / "model")
    recipe = write(tmp_path, REPLACE.replace("WEIGHTS", "{file: w.safetensors}"))
    facts = resolve(
        load_recipe(write(tmp_path, REPLACE.replace("WEIGHTS", RANDOM), name="facts")), read_model_files(folder / "model")
    ).facts
    save_weights(tmp_path / "w.safetensors", facts, into="encoder")
    assert not build(recipe, tmp_path / "out", record=False).cached
    assert build(recipe, tmp_path / "out", record=False).cached
    save_weights(tmp_path / "w.safetensors", facts, seed=8, into="encoder")
    assert not build(recipe, tmp_path / "out", record=False).cached


# ---------------------------------------------------------------------------------------------------------- negative twins
@pytest.mark.parametrize(("site", "graph"), [("replace", "vision_0.onnx"), ("decoder", "compress_1.onnx")])
def test_exchanged_weights_are_found(bundles: Callable[..., Path], folder: Path, tmp_path: Path, site: str, graph: str) -> None:
    right, other = bundles(site), bundles(site, "{random: 6}")
    wrong = Path(shutil.copytree(right, tmp_path / "wrong"))
    for name in (graph, graph.replace("_0.onnx", ".data") if "vision" in graph else graph.replace(".onnx", ".data")):
        shutil.copyfile(other / "onnx" / name, wrong / "onnx" / name)
    seal(wrong, open_manifest(wrong))
    with pytest.raises(ParityError):
        recorded_ladder(wrong).raise_if_failed()
    ladder = climb(wrong, folder / "model", steps=2)
    assert ladder.first_bad is not None and ladder.first_bad.subgraph == f"onnx/{graph}"


def test_the_reference_reads_the_weights_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the reference to read through the export's source, a fault there would be on both sides."""
    from tmc_export.export import learned
    from tmc_export.verify._learned import MethodWeights

    def never(*_: Any) -> None:
        raise AssertionError("the reference used the export's reader")

    monkeypatch.setattr(learned.LearnedSource, "read", never)
    recipe = write(folder, REPLACE.replace("WEIGHTS", RANDOM), name="again")
    plan = resolve(load_recipe(recipe), read_model_files(recipe.parent / "model"))
    held = MethodWeights(torch.float16).of(plan.vision[0].stages[0])
    assert {n: tuple(t.shape) for n, t in held.items()} == dict(plan.vision[0].stages[0].weights.shapes)  # type: ignore[union-attr]
    assert {t.dtype for t in held.values()} == {torch.float16}


# ------------------------------------------------------------------------------------------------- the shipped small model
def test_tiny_llava_builds_runs_and_verifies(tmp_path: Path, repository: Path) -> None:
    entry = "{at: projector.replace, method: learned, into: encoder, step: 2, weights: {random: 0}}"
    recipe = write(tmp_path, entry, model=str(TINY_LLAVA))
    ran = tmc("build", recipe, "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    picture = repository / "examples" / "pictures" / "scene-1.png"
    ran = tmc("run", tmp_path / "out", "--image", picture, "--prompt", "what is at c4", "--max-new-tokens", "4")
    assert ran.code == 0, ran.err
    ran = tmc("verify", tmp_path / "out", "--model", TINY_LLAVA, "--json")
    assert ran.code == 0 and json.loads(ran.out)["passed"], ran.out
    ran = tmc("plan", recipe)
    assert ran.code == 0 and "random weights (seed 0), accuracy n/a" in ran.out


# ------------------------------------------------------------------------------------------------------------------- Qwen
@pytest.mark.parametrize("save", [save_small_qwen2_vl, save_small_qwen2_5_vl])
def test_patches_of_a_merging_family_arrive_in_raster_order(save: Callable[[Path], Path], tmp_path: Path) -> None:
    """Bundle and reference agree although each undoes the family's order of patches by itself; two buckets."""
    save(tmp_path / "model")
    entry = "{at: projector.replace, method: learned, into: encoder, step: 1, keep_grid: true, weights: {random: 0}}"
    recipe = write(tmp_path, entry, images="images: 1, image_size: [[84, 140], [112, 112]]")
    bundle = build(recipe, tmp_path / "out").folder
    program = open_manifest(bundle).program
    assert [(v.tokens, v.grid) for v in program.vision] == [(60, (6, 10)), (64, (8, 8))]
    assert climb(bundle, tmp_path / "model", steps=2).passed


@pytest.mark.parametrize(("save", "norm"), [(save_small_qwen2_vl, "layer"), (save_small_qwen2_5_vl, "rms")])
def test_the_models_own_merger_as_a_method_changes_nothing(save: Callable[..., Path], norm: str, tmp_path: Path) -> None:
    """patch_merger with the weights of the family's merger: the vision graph's tokens are those of the family's own projector."""
    save(tmp_path / "model", layers=1, vision_layers=2)
    tensors = {n: t for n, t in load_file(tmp_path / "model" / "model.safetensors").items() if "merger." in n}
    prefix = next(n for n in tensors).partition("merger.")[0] + "merger."
    found = []
    for weights in (tensors, {n: t * 1.01 for n, t in tensors.items()}, None):
        name = f"w{len(found)}"
        entry = f"{{at: projector.replace, method: patch_merger, norm: {norm}, weights: {{file: {name}.safetensors, prefix: {prefix}}}}}"
        if weights is not None:
            save_file(weights, tmp_path / f"{name}.safetensors")
        recipe = write(tmp_path, entry, images="images: 1, image_size: [84, 140]", name=name)
        if weights is None:
            recipe.write_text(
                recipe.read_text("utf-8").partition("compress:")[0] + "target: {device: cpu, runtime: onnxruntime}\n", "utf-8"
            )
        bundle = build(recipe, tmp_path / f"out{name}", record=False).folder
        graph = OnnxRuntimeBackend(bundle, BackendOptions(threads=1)).graph("onnx/vision_0.onnx")
        (pixels,) = graph.inputs
        found.append(graph.run({pixels: np.random.default_rng(0).standard_normal((1, 60, 1176), np.float32)})["tokens"])
    own, changed, without = found
    np.testing.assert_allclose(own, without, rtol=1e-5, atol=1e-6)
    assert np.abs(changed - without).max() > 1e-3


def test_the_order_of_patches_is_the_rasters(tmp_path: Path) -> None:
    """Each patch's pixels say its row and column; what arrives must be 0, 1, 2, … of them."""
    from tmc_export.verify._towers import load_model

    save_small_qwen2_5_vl(tmp_path / "model")
    files = read_model_files(tmp_path / "model")
    recipe = write(tmp_path, "{at: projector, method: pool, kernel: 2, mode: average}", images="images: 1, image_size: [84, 140]")
    plan = resolve(load_recipe(recipe), files).vision[0]
    rows, columns = plan.grid
    tower: Any = load_model(tmp_path / "model", torch.float32).tower
    numbered = torch.arange(rows * columns, dtype=torch.float32).view(1, 1, rows, columns)
    raster = numbered.repeat_interleave(14, 2).repeat_interleave(14, 3).expand(1, 3, -1, -1)
    tower.embed(raster, plan)  # listens to the untouched model once
    tower.visual.patch_embed.forward = lambda patches: patches.mean(1, keepdim=True)
    embedded = tower.embed(raster, plan)
    assert embedded.flatten().tolist() != list(range(rows * columns))
    assert tower.in_raster(embedded).flatten().tolist() == list(range(rows * columns))


def test_a_picture_that_is_no_raster_is_refused_there(tmp_path: Path) -> None:
    save_small_qwen2_vl(tmp_path / "model")
    recipe = write(tmp_path, "{at: projector.replace, method: learned, into: encoder, weights: {random: 0}}")
    before = listing(tmp_path)
    ran = tmc("build", recipe, "-o", tmp_path / "out", "-q")
    assert ran.code == 3 and "3 rotary axes need a row and a column for each" in ran.error()
    assert listing(tmp_path) == before
