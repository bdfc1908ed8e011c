"""Text towers in a plan: read from config.json alone, shared, counted, and refused with line, reason and fix. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tmc_export.core.errors import LegalityError, ModelError
from tmc_export.plan._flops import tower_flops
from tmc_export.plan._weights import tower_bytes
from tmc_export.plan.describe import plan_json
from tmc_export.plan.legality import _check_cut_needs
from tmc_export.plan.make import PlanReport, make_plan, report_plan
from tmc_export.plan.source import read_model_files
from tmc_export.plan.types import Plan
from tmc_export.recipe import Recipe, load_recipe

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llava"
TRIM = "{at: encoder, method: trim, keep: 50%, tower: ./clip, width: 24, weights: {random: 0}}"
VID = "{at: projector.replace, method: llama_vid, grid: 7, tower: ./clip, tower_width: 24, weights: {random: 0}}"
TEXT = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 16, "eos_token_id": 99}  # fmt: skip
CLIP = {"model_type": "clip", "projection_dim": 24, "text_config": TEXT}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, CLIP)
    return tmp_path


def save(folder: Path, config: object) -> None:
    (folder / "clip").mkdir(exist_ok=True)
    (folder / "clip" / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "clip" / "tokenizer.json").write_text("{}", "utf-8")  # only `build` opens it


def recipe_of(folder: Path, *entries: str, images: int = 1) -> Recipe:
    lines = ["recipe: 1", "name: towers", f"model: {{source: {MODEL}, dtype: float32}}"]
    lines += [f"inputs: {{images: {images}, text_tokens: 32, new_tokens: 16}}", "compress:", *(f"  - {e}" for e in entries)]
    path = folder / "r.yaml"
    path.write_text("\n".join([*lines, "target: {device: cpu, runtime: onnxruntime}", ""]), "utf-8")
    return load_recipe(path)


def plan_of(folder: Path, *entries: str) -> Plan:
    return make_plan(recipe_of(folder, *entries), read_model_files(MODEL))[0]


def report_of(folder: Path, *entries: str) -> PlanReport:
    return report_plan(recipe_of(folder, *entries), read_model_files(MODEL))


def refusal(folder: Path, *entries: str) -> str:
    with pytest.raises((LegalityError, ModelError)) as caught:
        plan_of(folder, *entries)
    text = str(caught.value)
    assert "r.yaml:6" in text, text
    return text


# ------------------------------------------------------------------------------------------------------------- what it says
def test_numbers_of_a_tower(folder: Path) -> None:
    (tower,) = plan_of(folder, TRIM).towers
    assert (tower.index, tower.source, tower.width, tower.tokens, tower.end) == (0, "./clip", 24, 16, 99)
    assert (tower.hidden, tower.layers, tower.heads, tower.intermediate, tower.vocabulary) == (32, 2, 2, 64, 100)
    assert tower.path == (folder / "clip").resolve()


def test_a_text_side_alone_and_the_defaults(folder: Path) -> None:
    save(folder, {"model_type": "clip_text_model", "projection_dim": 24, "eos_token_id": 2})
    (tower,) = plan_of(folder, TRIM).towers
    assert (tower.tokens, tower.end, tower.hidden, tower.layers, tower.vocabulary) == (77, 49407, 512, 12, 49408)


def test_openai_spells_its_numbers_twice(folder: Path) -> None:
    save(folder, {"model_type": "clip", "projection_dim": 24, "text_config": {"hidden_size": 512}, "text_config_dict": TEXT})
    assert plan_of(folder, TRIM).towers[0].hidden == 32
    save(folder, {"model_type": "clip", "projection_dim": 24, "text_config": TEXT, "text_config_dict": None})
    assert plan_of(folder, TRIM).towers[0].hidden == 32


def test_a_plan_with_a_tower_imports_no_torch(folder: Path) -> None:
    recipe_of(folder, TRIM)
    code = (
        "import sys; from pathlib import Path; from tmc_export.recipe import load_recipe; from tmc_export.plan.make import make_plan; "
        "from tmc_export.plan.source import read_model_files; "
        "plan, _ = make_plan(load_recipe(Path(sys.argv[1])), read_model_files(Path(sys.argv[2]))); "
        "print(plan.towers[0].width, [m for m in ('torch', 'transformers', 'tokenizers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder / "r.yaml"), str(MODEL)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "24 []"


def test_stages_share_a_tower(folder: Path) -> None:
    later = "{at: encoder, method: trim, keep: 20, tower: TOWER, width: 24, weights: {random: 1}}"
    assert [t.index for t in plan_of(folder, TRIM, later.replace("TOWER", "./clip")).towers] == [0]
    (folder / "twin").symlink_to(folder / "clip")
    assert [t.source for t in plan_of(folder, TRIM, later.replace("TOWER", "./twin")).towers] == ["./clip", "./twin"]


def test_the_picture_hangs_on_its_question(folder: Path) -> None:
    assert plan_of(folder, TRIM).query_aware_vision
    assert any("none can be encoded ahead of it or shared" in note for note in report_of(folder, TRIM).notes)
    assert plan_of(folder, VID).towers and not plan_of(folder, VID).query_aware_vision  # its question acts in the decoder


def test_bytes_and_operations(folder: Path) -> None:
    found = report_of(folder, TRIM)
    (tower,) = found.plan.towers
    # tables (100 + 16)·32; 2 layers of 4·(32² + 32) + 2·32·64 + 64 + 32 + 4·32 = 8544; final norm 64; projection 32·24
    weights = 116 * 32 + 2 * 8544 + 64 + 768
    assert tower_bytes(found.plan, tower) == found.cost.weights.towers == 4 * weights
    # 2 layers of 8·16·32² + 4·16²·32 + 4·16·32·64 and 2·32·24
    assert tower_flops(tower) == found.cost.flops["text tower"] == 2 * (131_072 + 32_768 + 131_072) + 1536
    plain = report_of(folder, "{at: encoder, method: visionzip, dominant: 90, contextual: 8}")
    assert "text tower" not in plain.cost.flops and plain.cost.weights.towers == 0
    assert found.cost.prompt_dispatches == plain.cost.prompt_dispatches + 1
    assert [b.name for b in found.build][0] == "text_tower_0" and found.run.weights > plain.run.weights


def test_the_json_form_names_no_folder_of_this_machine(folder: Path) -> None:
    told = json.dumps(plan_json(plan_of(folder, TRIM)))
    assert '"source": "./clip"' in told and str(folder) not in told


# ----------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(("entry", "fix"), [(TRIM.replace("width: 24", "width: 25"), "write width: 24"),
                                            (VID.replace("tower_width: 24", "tower_width: 25"), "write tower_width: 24")])  # fmt: skip
def test_another_width(folder: Path, entry: str, fix: str) -> None:
    text = refusal(folder, entry)
    assert "takes a text embedding of 25 channels, the tower './clip' gives 24 (projection_dim)" in text and fix in text


def test_no_clip(folder: Path) -> None:
    save(folder, {"model_type": "siglip", "text_config": {}})
    assert "is of model_type 'siglip'; built are CLIP's (clip, clip_text_model): name such a checkpoint" in refusal(folder, TRIM)
    save(folder, [])
    assert "is of model_type 'None'" in refusal(folder, TRIM)


def test_no_folder_no_config_no_tokenizer(folder: Path) -> None:
    assert "text tower: the folder './gone'" in refusal(folder, TRIM.replace("./clip", "./gone"))
    (folder / "clip" / "tokenizer.json").unlink()
    assert "has no tokenizer.json, which the runtime reads; save its tokenizer" in refusal(folder, TRIM)
    (folder / "clip" / "config.json").write_text("{", "utf-8")
    assert "cannot be read as JSON" in refusal(folder, TRIM)
    (folder / "clip" / "config.json").unlink()
    assert "holds no config.json" in refusal(folder, TRIM)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "32"), ("max_position_embeddings", 0), ("vocab_size", True)])
def test_a_config_that_lies(folder: Path, key: str, value: object) -> None:
    save(folder, {**CLIP, "text_config": {**TEXT, key: value}})
    assert f"has {key}: {value!r} in its config.json; it must be 1 or more" in refusal(folder, TRIM)


def test_a_hub_id_that_is_not_at_hand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: object, **__: object) -> str:
        raise OSError("offline mode is set")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "snapshot_download", offline)
    text = refusal(folder, TRIM.replace("./clip", "some/clip"))
    assert "text tower: 'some/clip' is no folder beside the recipe and could not be fetched from the hub (HF_HUB_OFFLINE is set)" in text


def test_a_question_belongs_to_its_pictures(folder: Path) -> None:
    recipe = recipe_of(folder, VID)
    plan, _ = make_plan(recipe, read_model_files(MODEL))
    (cut,) = plan.cuts
    _check_cut_needs(recipe, cut, cut.stages[0])
    with pytest.raises(LegalityError, match="r.yaml:6.*all pictures at once under scope: joint, and a question belongs to its pictures"):
        _check_cut_needs(recipe, cut, replace(cut.stages[0], scope="joint"))
