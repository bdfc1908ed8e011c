"""int8 KV slots: a scale per tensor, per KV head or per channel, found on few or many questions.

    python benchmarks/slot_scales.py

tiny-llava, uncompressed, on made-up scenes with a question each. Scales are the largest magnitude over the calibration questions, divided
by 127; other scenes are then answered by the reference along the answers of a cache that does not round, and the logits of all steps are
compared. Nothing is timed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tiny-llava"))

import numpy as np
import torch
from scenes import scene  # type: ignore[import-not-found]

from benchmarks._common import REPOSITORY, save, workplace
from tmc_export.families import family_of
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.make import make_plan
from tmc_export.plan.source import read_model_files
from tmc_export.plan.types import Plan
from tmc_export.recipe import load_recipe
from tmc_export.runtime._chat import ChatTemplate, expand_image_tokens
from tmc_export.runtime._images import load_image, prepare
from tmc_export.runtime._tokenizer import Tokenizer
from tmc_export.verify._cache import Cache
from tmc_export.verify.compare import measure
from tmc_export.verify.record import Script, answer
from tmc_export.verify.recorded import Case
from tmc_export.verify.reference import Reference

MODEL = REPOSITORY / "examples" / "tiny-llava"
RECIPE = f"""recipe: 1
name: slot-scales
model: {{source: {MODEL}, dtype: float32}}
inputs: {{images: 1, text_tokens: 48, new_tokens: 16}}
target: {{device: cpu, runtime: onnxruntime}}
"""
SAMPLES, ASKED, STEPS = (4, 8, 16, 32, 128), 64, 8
GRAINS = {"tensor": (0, 1), "KV head": (1,), "channel": ()}
"""What shares a scale → the axes of `[g, d]` that the largest magnitude is taken over."""


class Rounding(Cache):
    """A cache of codes with a scale per channel, `[g, d]`."""

    def __init__(self, layers: int, tops: dict[str, Any]) -> None:
        super().__init__(layers)
        self._scales = {name: torch.from_numpy(np.maximum(top, 1e-6))[None, :, None, :] / 127 for name, top in tops.items()}
        self._rounding = True


def scripts(plan: Plan, files: ModelFiles, first: int, count: int) -> list[Script]:
    """Questions about scenes `first …`, one each, their kinds in turn."""
    family, tokenizer = family_of(dict(files.config)), Tokenizer(MODEL)
    template = ChatTemplate.from_folder(MODEL, tokenizer.special_tokens)
    rule, image_text = family.image_rule(files, plan.vision[0].size, None), family.tokens(files).image_text
    if template is None:
        raise SystemExit(f"{MODEL} has no chat template")
    made = []
    for number in range(count):
        drawn = scene(first + number, "heldout")
        question = drawn.questions[number % len(drawn.questions)].text
        ids = tokenizer.encode(template.render([template.message("user", question, 1, image_text)]))
        made.append(Script(str(number), ((((0, prepare(load_image(drawn.image), rule)),), tuple(ids)),)))
    return made


def tops_of(cases: Sequence[Case]) -> dict[str, Any]:
    """The largest magnitude of every channel, `[g, d]`, of the prompts' keys and values."""
    found: dict[str, Any] = {}
    for block in (b for case in cases for b in case.turns[0].expected.blocks):
        for kind, rows in (("key", block.keys), ("value", block.values)):
            for layer, each in rows.items():
                name = f"{layer}.{kind}"
                found[name] = np.maximum(found.get(name, 0.0), np.abs(each).max(1))
    return found


def asked(reference: Reference, cases: Sequence[Case], tops: dict[str, Any]) -> tuple[list[float], float]:
    """Noise of every answer's logits in dB, and the share of steps whose likeliest token is the same."""
    noise, same = [], []
    for case in cases:
        turn = case.turns[0]
        ids, group = expand_image_tokens(turn.ids, reference.plan.facts.image_token, reference.visual_tokens(turn.pixels, turn.buckets))
        reference.reset()
        reference._decoder.cache = Rounding(len(reference.model.text.layers), tops)
        want = turn.expected.logits
        got = reference.turn(turn.pixels, ids, group.astype(np.int64), forced=turn.expected.tokens, buckets=turn.buckets).logits
        noise.append(measure(got, want).sqnr_db)
        same += (got.argmax(-1) == want.argmax(-1)).tolist()
    return noise, float(np.mean(same))


def main() -> None:
    with workplace(1 << 20) as base:
        (base / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        files = read_model_files(MODEL)
        plan, _ = make_plan(load_recipe(base / "recipe.yaml"), files)
    reference = Reference(MODEL, plan, trace=True)
    held_out = [answer(reference, s, plan, STEPS) for s in scripts(plan, files, 10_000, ASKED)]
    seen = [answer(reference, s, plan, 1) for s in scripts(plan, files, 20_000, max(SAMPLES))]
    rows, raw = [], []
    for samples in SAMPLES:
        tops = tops_of(seen[:samples])
        for grain, axes in GRAINS.items():
            shared = {n: np.broadcast_to(t.max(axes, keepdims=True), t.shape).copy() if axes else t for n, t in tops.items()}
            noise, same = asked(reference, held_out, shared)
            raw.append({"samples": samples, "scale_per": grain, "sqnr_db": noise, "same_tokens": same})
            figure = f"{statistics.median(noise):.1f} dB (least {min(noise):.1f}), {same:.1%} of the likeliest tokens"
            rows.append({"what": f"{samples} questions, a scale per {grain}", "figure": figure})
            print(rows[-1]["what"], rows[-1]["figure"], file=sys.stderr, flush=True)
    what = (
        f"Logits of tiny-llava with int8 KV slots against those without, {ASKED} questions of {STEPS} steps that calibration did not see; "
        "ranges are the largest magnitudes of calibration."
    )
    print(save("slot_scales", {"what": what, "rows": rows, "raw": {"answers": raw}}))


if __name__ == "__main__":
    main()
