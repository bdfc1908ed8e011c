"""The subgraphs run eagerly, and what calibration sees of them: against onnxruntime, and against hooks in Hugging Face's own model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from torch import nn  # noqa: E402

import tmc_export  # noqa: E402
from tmc_export.api import calibration  # noqa: E402
from tmc_export.api.calibration import observe  # noqa: E402
from tmc_export.api.calibration_data import Sample  # noqa: E402
from tmc_export.api.eager_program import eager_program  # noqa: E402
from tmc_export.bundle.read import open_manifest  # noqa: E402
from tmc_export.core.errors import RecipeError  # noqa: E402
from tmc_export.export.checkpoint import Checkpoint  # noqa: E402
from tmc_export.plan.make import make_plan  # noqa: E402
from tmc_export.plan.source import read_model_files  # noqa: E402
from tmc_export.recipe import load_recipe  # noqa: E402
from tmc_export.runtime._backend import BackendOptions  # noqa: E402
from tmc_export.runtime.session import Session  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

ROOT = Path(__file__).parents[2]
MODEL, PICTURE = ROOT / "examples" / "tiny-llava", ROOT / "examples" / "pictures" / "scene-1.png"
RECIPE = """recipe: 1
name: eager
model: {{source: {model}, dtype: {dtype}}}
inputs: {{images: 1, text_tokens: 32, new_tokens: 8}}
compress: [{entries}]
target: {{device: cpu, runtime: onnxruntime}}
"""


@dataclass
class Both:
    folder: Path
    eager: Session
    linears: dict[str, nn.Linear]


def made(folder: Path, name: str, entries: str, dtype: str = "float32", budget: int = 2 << 30) -> Both:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(model=MODEL, entries=entries, dtype=dtype), "utf-8")
    tmc_export.build(path, folder / name, record=False, engines=False)
    recipe, files = load_recipe(path), read_model_files(MODEL)
    plan, _ = make_plan(recipe, files)
    config = transformers.AutoConfig.from_pretrained(MODEL)
    eager = eager_program(plan, files, MODEL, config, recipe.inputs.fit, budget=budget)
    manifest = open_manifest(folder / name)
    assert eager.program.model_copy(update={"dtype": manifest.program.dtype}) == manifest.program
    session = Session(folder / name, manifest.model_copy(update={"program": eager.program}), eager.backend, BackendOptions())
    return Both(folder / name, session, dict(eager.linears))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return made(tmp_path_factory.mktemp("plain"), "plain", "")


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """A cut that reads rows of the layer before; weights that hardly fit in memory."""
    return made(tmp_path_factory.mktemp("cut"), "cut", "{at: decoder.2, method: fastv, keep: 50%}", budget=1 << 20)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return made(tmp_path_factory.mktemp("learned"), "learned", "{at: projector.replace, method: ldp_v2, weights: {random: 0}}")


@pytest.mark.parametrize("name", ["plain", "cut", pytest.param("learned", marks=pytest.mark.slow)])
def test_eager_answers_as_onnxruntime_does(name: str, request: pytest.FixtureRequest) -> None:
    both: Both = request.getfixturevalue(name)
    other = tmc_export.load(both.folder)
    for question in ("What is the color of the shape?", "how many shapes are there"):
        one = both.eager.generate([str(PICTURE)], question, chat=False, max_new_tokens=4)
        two = other.generate([str(PICTURE)], question, chat=False, max_new_tokens=4)
        assert one.tokens == two.tokens and one.kept == two.kept
        laid = [s.prompt([5, 6, s.program.image_token, 7], s.encode_images([str(PICTURE)])) for s in (both.eager, other)]
        for session in (both.eager, other):
            session.reset()
        got, want = (s.run_prompt(p).logits for s, p in zip((both.eager, other), laid, strict=True))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
        assert np.abs(got - np.roll(want, 1)).max() > 1e-2


def theirs(prompt: Any, checkpoint: Checkpoint | None = None) -> dict[str, tuple[int, float]]:
    """Rows and largest magnitude of what every linear of Hugging Face's model gets for a prompt, unpadded."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    found: dict[str, tuple[int, float]] = {}

    def look(name: str, given: tuple[torch.Tensor, ...]) -> None:
        rows = given[0].reshape(-1, given[0].shape[-1])
        found[name] = (len(rows), float(rows.abs().max()))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given, n=name: look(n, given))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(prompt.ids)[None], pixel_values=torch.from_numpy(prompt.pixels[0][1]), logits_to_keep=1)
    return found


def seen(both: Both, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[dict[str, tuple[int, float]], Any]:
    asked: list[Any] = []
    right = Session.run_prompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "run_prompt", lambda self, prompt, route="auto": (asked.append(prompt), right(self, prompt, route))[1])
        found = observe(both.eager, [Sample("what is the color of the shape", (PICTURE,), "x:1")], both.linears)
    return {name: (h.rows, h.peak) for name, h in found.inputs.items()}, asked[0]


def test_calibration_sees_what_hugging_face_s_linears_get(plain: Both) -> None:
    mine, prompt = seen(plain)
    wanted = theirs(prompt)
    assert len(mine) == len(wanted) - 1 and len(prompt.ids) < plain.eager.program.blocks[0].tokens
    for name, (rows, peak) in mine.items():
        same = name.removesuffix(".weight").replace("language_model.model.", "language_model.")
        assert (rows, peak) == (wanted[f"model.{same}"][0], pytest.approx(wanted[f"model.{same}"][1], rel=1e-5)), name


def test_rows_of_padding_would_be_seen(plain: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: a hook that takes every row of the bucket counts more rows."""
    mine, _ = seen(plain)
    monkeypatch.setattr(calibration, "running_rows", lambda: None)
    wrong, _ = seen(plain)
    layers = [n for n in mine if "layers.0.mlp.up_proj" in n or "layers.2.self_attn.q_proj" in n]
    assert layers and any(wrong[n][0] > mine[n][0] for n in layers)


def test_behind_a_cut_only_what_was_kept_is_seen(cut: Both) -> None:
    mine, prompt = seen(cut)
    rows = {int(n.split("layers.")[1].split(".")[0]): r for n, (r, _) in mine.items() if "language_model" in n and "mlp.up_proj" in n}
    text, visual = int((prompt.group == 0).sum()), int((prompt.group > 0).sum())
    assert rows == {0: text + visual, 1: text + visual, 2: text + visual // 2, 3: text + visual // 2}


def test_a_sample_that_does_not_fit_is_named(plain: Both) -> None:
    with pytest.raises(RecipeError, match=r"x:7: the prompt has \d+ tokens, the bucket holds"):
        observe(plain.eager, [Sample("what " * 60, (PICTURE,), "x:7")], plain.linears)
