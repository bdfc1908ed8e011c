"""What calibration sees of keys and values: against the cache of Hugging Face's own model, per head, without padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

import tmc_export  # noqa: E402
from tests.api.test_eager import MODEL, PICTURE, RECIPE, Both, made  # noqa: E402
from tests.quantize._slots import KV, build_coded  # noqa: E402
from tmc_export.api import calibration_kv  # noqa: E402
from tmc_export.api.calibration import observe  # noqa: E402
from tmc_export.api.calibration_data import Sample  # noqa: E402
from tmc_export.api.calibration_kv import SlotsSeen, observed_slots, slot_scales  # noqa: E402
from tmc_export.core.errors import RecipeError  # noqa: E402
from tmc_export.quantize.histogram import Histogram  # noqa: E402
from tmc_export.runtime.session import Session  # noqa: E402

pytestmark = pytest.mark.usefixtures("traced_once")

QUESTIONS = ("what is at c4", "how many circles", "what is the color of the shape at a1", "is there a digit")
SAMPLE = Sample("what is the color of the shape", (PICTURE,), "x:1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return made(tmp_path_factory.mktemp("plain"), "plain", "")


def seen(both: Both) -> tuple[SlotsSeen, Any]:
    """What one question shows, and its prompt."""
    asked: list[Any] = []
    right, found = Session.run_prompt, SlotsSeen()
    with pytest.MonkeyPatch.context() as patch, observed_slots(both.eager._backend, found):  # type: ignore[arg-type]
        patch.setattr(Session, "run_prompt", lambda self, prompt, route="auto": (asked.append(prompt), right(self, prompt, route))[1])
        observe(both.eager, [SAMPLE], {})
    return found, asked[0]


def test_calibration_sees_hugging_face_s_cache(plain: Both) -> None:
    found, prompt = seen(plain)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        ids, pixels = torch.from_numpy(prompt.ids)[None], torch.from_numpy(prompt.pixels[0][1])
        cache = model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1).past_key_values.layers
    assert set(found) == {f"{layer}.{kind}" for layer in range(len(cache)) for kind in ("key", "value")}
    scales = slot_scales(found)
    for layer, held in enumerate(cache):
        for kind, rows in (("key", held.keys), ("value", held.values)):
            heads, name = found[f"{layer}.{kind}"], f"{layer}.{kind}"
            assert [h.rows for h in heads] == [len(prompt.ids)] * rows.shape[1]
            peaks = rows[0].abs().amax((1, 2)).numpy()
            np.testing.assert_allclose([h.peak for h in heads], peaks, rtol=1e-5)
            np.testing.assert_allclose(scales[name], peaks / 127, rtol=1e-5)
            assert np.abs(peaks - peaks[::-1]).max() > 1e-3, "heads differ, so that one in another's place would be seen"


def test_rows_of_padding_would_be_seen(plain: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: an observer that takes every row of the bucket counts more."""
    right, _ = seen(plain)
    monkeypatch.setattr(calibration_kv, "running_rows", lambda: None)
    wrong, _ = seen(plain)
    assert all(w.rows > r.rows for name in right for w, r in zip(wrong[name], right[name], strict=True))


def test_behind_a_cut_only_what_was_kept_is_seen(tmp_path: Path) -> None:
    found, prompt = seen(made(tmp_path, "cut", "{at: decoder.2, method: fastv, keep: 50%}"))
    text, visual = int((prompt.group == 0).sum()), int((prompt.group > 0).sum())
    rows = {int(name.split(".")[0]): {h.rows for h in heads} for name, heads in found.items()}
    assert rows == {0: {text + visual}, 1: {text + visual}, 2: {text + visual // 2}, 3: {text + visual // 2}}


def test_what_is_found_makes_a_bundle_that_answers_as_before(plain: Both, tmp_path: Path) -> None:
    """From questions to scales to slots of int8; `build` plays the recorded conversations through it."""
    found, said = SlotsSeen(), []
    with observed_slots(plain.eager._backend, found):  # type: ignore[arg-type]
        observe(plain.eager, [replace(SAMPLE, prompt=p) for p in QUESTIONS], {}, said.append)
    assert said == [f"calibrate {n}/{len(QUESTIONS)}" for n in range(1, len(QUESTIONS) + 1)]
    recipe = tmp_path / "coded.yaml"
    recipe.write_text(RECIPE.format(model=MODEL, entries="", dtype="float32") + f"quantize: {KV}\n", "utf-8")
    coded = tmc_export.load(build_coded(recipe, tmp_path / "coded", slot_scales(found), record=True))
    other = tmc_export.load(plain.folder)
    assert coded.program.kv is not None and other.program.kv is None
    for question in QUESTIONS:
        one, two = (s.generate([str(PICTURE)], question, max_new_tokens=8) for s in (coded, other))
        assert one.tokens == two.tokens, question


def test_nothing_is_seen_behind_the_context(plain: Both) -> None:
    found, _ = seen(plain)
    before = {name: [h.rows for h in heads] for name, heads in found.items()}
    observe(plain.eager, [SAMPLE], {})
    assert before == {name: [h.rows for h in heads] for name, heads in found.items()}


def test_values_that_are_not_finite_are_named(plain: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    right = calibration_kv.Histogram.add
    monkeypatch.setattr(calibration_kv.Histogram, "add", lambda self, rows: right(self, rows * np.float32(np.inf)))
    with pytest.raises(RecipeError, match=r"x:1: head 0 of the KV tensor '0\.key': \d+ of \d+ values are not finite"):
        seen(plain)


def test_scales_of_heads() -> None:
    wide, still = Histogram(2), Histogram(2)
    wide.add(np.r_[np.full((999, 2), 1.0), [[1.0, 100.0]]].astype(np.float32))
    still.add(np.zeros((4, 2), np.float32))
    assert slot_scales({"0.key": (wide, still)}) == {"0.key": (100 / 127, 1 / 127)}
    assert slot_scales({"0.key": (wide, still)}, codes="fp8") == {"0.key": (100 / 448, 1 / 448)}
    narrow = slot_scales({"0.key": (wide,)}, "percentile", 99.0)["0.key"][0]
    assert 1 / 127 <= narrow < 2 / 127
