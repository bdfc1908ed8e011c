"""Plans with learned methods: what is refused, what is counted, what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests._learned import registered, save_weights  # noqa: E402
from tests.plan.conftest import Writer  # noqa: E402
from tmc_export.core.errors import LegalityError, ModelError, RecipeError, TmcError  # noqa: E402
from tmc_export.families._contract import ModelFiles  # noqa: E402
from tmc_export.plan._weights import projector_weights, vision_bytes, weight_bytes  # noqa: E402
from tmc_export.plan.describe import plan_json  # noqa: E402
from tmc_export.plan.make import make_plan, report_plan  # noqa: E402
from tmc_export.plan.types import Plan  # noqa: E402

REPLACE = "at: projector.replace, method: learned, into: encoder"
RANDOM = ", weights: {random: 0}"
CPU = {"target": "device: cpu, runtime: onnxruntime", "model": "dtype: float32"}


@pytest.fixture(autouse=True)
def _method() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture
def plan(write: Writer, files: ModelFiles) -> Callable[..., Plan]:
    return lambda *entries, **lines: make_plan(write(*entries, **{**CPU, **lines}), files)[0]


def refusal(plan: Callable[..., Plan], *entries: str, **lines: Any) -> TmcError:
    with pytest.raises(TmcError) as caught:
        plan(*entries, **lines)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return caught.value


# ---------------------------------------------------------------------------------------------------------- what is said
@pytest.mark.parametrize(
    ("entry", "kind", "place", "says"),
    [
        (REPLACE, RecipeError, "8:5", ("'learned' has 4 learned tensors, such as 'norm.weight'", "weights: {random: 0}")),
        ("at: projector, method: pool" + RANDOM, RecipeError, "8:44", ("'pool' has no learned weights; remove the key",)),
        (
            "at: projector, method: learned, weightless: true" + RANDOM,
            RecipeError,
            "8:65",
            ("has no learned weights with these options; remove the key",),
        ),
        (
            "at: projector.replace, method: learned, into: encoder, out: encoder" + RANDOM,
            LegalityError,
            "8:10",
            ("leaves tokens of 1024 channels, the decoder takes 4096",),
        ),
        (
            "at: encoder, method: learned, into: encoder" + RANDOM,
            LegalityError,
            "8:10",
            ("at encoder leaves tokens of 4096 channels, the projector takes 1024", "projector.replace"),
        ),
        ("at: decoder.2, method: learned, out: encoder" + RANDOM, LegalityError, "8:10", ("1024 channels, the decoder takes 4096",)),
        ("at: input, method: learned" + RANDOM, LegalityError, "8:10", ("4096 channels, the encoder takes 3",)),
        (
            "at: decoder.2, method: learned, step: 1, extra: 4" + RANDOM,
            LegalityError,
            "8:5",
            ("would keep 580 of 576 tokens", "use it at encoder, projector or projector.replace"),
        ),
    ],
)
def test_refused(plan: Callable[..., Plan], entry: str, kind: type[TmcError], place: str, says: tuple[str, ...]) -> None:
    error = refusal(plan, entry)
    assert type(error) is kind and f":{place}: " in str(error), error
    assert all(part in str(error) for part in says), error


def test_a_method_without_weights_in_this_configuration_needs_none(plan: Callable[..., Plan]) -> None:
    found = plan("at: projector, method: learned, weightless: true")
    assert found.vision[0].stages[0].weights is None


def test_one_projector_only(plan: Callable[..., Plan]) -> None:
    error = refusal(plan, REPLACE + RANDOM, REPLACE + RANDOM)
    assert type(error) is LegalityError and ":9:10: " in str(error) and "'learned' replaces the projector already" in str(error)


def test_a_quantized_projector_that_is_replaced(plan: Callable[..., Plan]) -> None:
    error = refusal(plan, REPLACE + RANDOM, quantize="{projector: {weights: fp16}}")
    assert type(error) is LegalityError and ":5:23: " in str(error) and "nothing to act on: 'learned' replaces" in str(error)


# ------------------------------------------------------------------------------------------------------- what is counted
def test_the_walk_through_a_replaced_projector(plan: Callable[..., Plan]) -> None:
    found = plan("at: projector, method: random, keep: 100", REPLACE + ", step: 2, extra: 3" + RANDOM)
    first, second = found.vision[0].stages
    assert (str(first.stage.at), first.before.tokens, first.before.width, first.before.class_tokens) == ("projector.replace", 576, 1024, 0)
    assert (first.after.tokens, first.after.width) == (291, 4096)
    assert (str(second.stage.at), second.before.tokens, second.after.tokens) == ("projector", 291, 100)
    assert found.vision[0].replacing is first and found.blocks[0].tokens == 100 + 128


@pytest.mark.parametrize("site", ["encoder", "projector", "projector.replace"])
def test_tokens_may_be_added_around_the_projector(plan: Callable[..., Plan], site: str) -> None:
    into = {"encoder": ", into: encoder, out: encoder", "projector": "", "projector.replace": ", into: encoder"}[site]
    found = plan(f"at: {site}, method: learned, step: 1, extra: 5{into}{RANDOM}")
    assert found.vision[0].tokens == 581 and found.vision[0].out_grid is None
    assert (found.blocks[0].tokens, found.blocks[0].capacity) == (581 + 128, 581 + 128 + 256)


def test_bytes_and_operations(plan: Callable[..., Plan], write: Writer, files: ModelFiles) -> None:
    whole, replaced = plan(), plan(REPLACE + RANDOM)
    numbers = 1024 * 4096 + 4096 + 2 * 1024
    own = projector_weights(whole.facts) * 4
    assert weight_bytes(replaced).methods == numbers * 4 and weight_bytes(replaced).projector == 0
    assert weight_bytes(whole).total - weight_bytes(replaced).total == own - numbers * 4
    assert vision_bytes(whole) - vision_bytes(replaced) == own - numbers * 4
    report = report_plan(write(REPLACE + RANDOM, **CPU), files)
    assert report.cost.flops["projector"] == 2 * 576 * 1024 * 4096
    cut = report_plan(write("at: decoder.2, method: learned, step: 4" + RANDOM, **CPU), files)
    assert cut.cost.weights.methods == (4096 * 4096 + 3 * 4096) * 4
    assert cut.cost.flops["cuts"] > 2 * 576 * 4096 * 4096
    assert cut.run.weights - report_plan(write(**CPU), files).run.weights == cut.cost.weights.methods


def test_the_notes_say_what_random_weights_are(write: Writer, files: ModelFiles, tmp_path: Path) -> None:
    notes = report_plan(write(REPLACE + RANDOM, **CPU), files).notes
    assert "compress.0: learned at projector.replace: random weights (seed 0), accuracy n/a" in notes
    assert any("operations of learned weights (learned) are an estimate" in note for note in notes)
    recipe = write(REPLACE + ", weights: {file: w.safetensors}", **CPU)
    save_weights(tmp_path / "w.safetensors", report_plan(write(**CPU), files).plan.facts, into="encoder")
    notes = report_plan(recipe, files).notes
    assert not any("random" in note for note in notes) and any("estimate" in note for note in notes)
    assert not any("learned" in note for note in report_plan(write(**CPU), files).notes)


def test_what_is_recorded_says_nothing_of_this_machine(plan: Callable[..., Plan], tmp_path: Path) -> None:
    facts = plan().facts
    save_weights(tmp_path / "w.safetensors", facts, "a.", into="encoder")
    found = plan(REPLACE + ", weights: {file: ./w.safetensors, prefix: a.}")
    weights = found.vision[0].stages[0].weights
    assert weights is not None and weights.path == tmp_path / "w.safetensors"
    data: Any = plan_json(found)
    said = data["vision"][0]["stages"][0]["weights"]
    assert said["file"] == "./w.safetensors" and said["prefix"] == "a." and said["shapes"]["norm.weight"] == [1024]
    assert str(tmp_path) not in json.dumps(data)


# --------------------------------------------------------------------------------------------------------------- the file
@pytest.fixture
def file(plan: Callable[..., Plan], tmp_path: Path) -> Path:
    return save_weights(tmp_path / "w.safetensors", plan().facts, "model.mm.", into="encoder")


FILE = REPLACE + ", weights: {file: w.safetensors, prefix: model.mm.}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_good_file(plan: Callable[..., Plan], tmp_path: Path, dtype: Any) -> None:
    save_weights(tmp_path / "w.safetensors", plan().facts, "model.mm.", dtype=dtype, into="encoder")
    assert plan(FILE).vision[0].stages[0].weights is not None


def test_missing_names_are_listed_with_the_nearest(plan: Callable[..., Plan], file: Path) -> None:
    tensors = load_file(file)
    tensors["model.mm.layers.0.proj.weights"] = tensors.pop("model.mm.layers.0.proj.weight")
    save_file(tensors, file)
    error = refusal(plan, FILE)
    assert type(error) is ModelError and error.exit_code == 2
    for part in (":8:", "w.safetensors lacks 1 of the 4 tensors of method 'learned' under the prefix 'model.mm.'"):
        assert part in str(error)
    assert "'layers.0.proj.weight' (nearest: 'model.mm.layers.0.proj.weights')" in str(error)


def test_a_wrong_prefix_is_put_right(plan: Callable[..., Plan], file: Path) -> None:
    error = refusal(plan, REPLACE + ", weights: {file: w.safetensors}")
    assert "lacks 4 of the 4 tensors" in str(error) and str(error).endswith("write prefix: 'model.mm.'")
    assert file.is_file()


def test_another_shape(plan: Callable[..., Plan], file: Path) -> None:
    tensors = load_file(file)
    tensors["model.mm.norm.weight"] = torch.ones(1000)
    save_file(tensors, file)
    error = refusal(plan, FILE)
    assert type(error) is ModelError and "'norm.weight' is [1000], needed is [1024]" in str(error) and "options" in str(error)


def test_whole_numbers(plan: Callable[..., Plan], file: Path) -> None:
    tensors = load_file(file)
    tensors["model.mm.norm.weight"] = torch.ones(1024, dtype=torch.int32)
    save_file(tensors, file)
    error = refusal(plan, FILE)
    assert type(error) is ModelError and "'norm.weight' is I32" in str(error) and "F32, F16, BF16" in str(error)


def _cut(data: bytes) -> bytes:
    return data[: len(data) - 100]


def _no_json(data: bytes) -> bytes:
    return data[:8] + b"\xff" * 40 + data[48:]


def _long(data: bytes) -> bytes:
    return (1 << 60).to_bytes(8, "little") + data[8:]


@pytest.mark.parametrize("damage", [_cut, _no_json, _long, lambda d: b"", lambda d: d[:5], lambda d: b"<html>404</html>" * 20])
def test_damaged(plan: Callable[..., Plan], file: Path, damage: Callable[[bytes], bytes]) -> None:
    file.write_bytes(damage(file.read_bytes()))
    error = refusal(plan, FILE)
    assert type(error) is ModelError and "w.safetensors" in str(error) and "damaged or incomplete: fetch it again" in str(error)


@pytest.mark.parametrize("header", ["[]", "1", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
                                    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
                                    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [9, 13]}}'])  # fmt: skip
def test_a_header_that_lies(plan: Callable[..., Plan], file: Path, header: str) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 8)
    error = refusal(plan, FILE)
    assert type(error) is ModelError and "damaged or incomplete" in str(error)


def test_no_file_and_no_pickle(plan: Callable[..., Plan], file: Path) -> None:
    error = refusal(plan, REPLACE + ", weights: {file: gone.safetensors}")
    assert type(error) is ModelError and "there is no file" in str(error) and "relative to the recipe" in str(error)
    file.rename(file.with_name("mm_projector.bin"))
    error = refusal(plan, REPLACE + ", weights: {file: mm_projector.bin}")
    assert type(error) is ModelError and "never pickle: convert it" in str(error)


def test_a_plan_reads_no_weight_and_imports_no_torch(file: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from tmc_export.plan.learned import read_header; "
        "held = read_header(Path(sys.argv[1]), 'x'); "
        "print(held['model.mm.norm.weight'], [m for m in ('torch', 'safetensors', 'numpy.random') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('F32', (1024,)) []"


OTHERS_WEIGHTS = {"trim"}
"""Training-free by their paper, and yet with weights: those of a pretrained tower beside the model, which the recipe names."""


def test_the_attribute_and_the_mapping_agree() -> None:
    from tests.graphs._checks import examples

    having = {e.method.name for e in examples() if e.method.weights(e.config, _facts())}
    learned = {e.method.name for e in examples() if not e.method.training_free}
    assert learned <= having, f"training_free = False, and weights() is empty in every sample: {sorted(learned - having)}"
    assert having - learned <= OTHERS_WEIGHTS, f"training_free, and weights() is not empty: {sorted(having - learned)}"


def _facts() -> Any:
    from tmc_export.graphs._synthetic import FACTS

    return FACTS
