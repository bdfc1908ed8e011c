"""Conversations about scenes for the small LLaVA that travels in the repository."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tmc_export.families.llava import Llava
from tmc_export.plan.source import read_model_files
from tmc_export.runtime._images import load_image, prepare
from tmc_export.runtime._tokenizer import Tokenizer
from tmc_export.verify.record import Script

__all__ = ["COMPRESS", "EXAMPLES", "LEADS", "MODEL", "SELECTING", "asked", "conversations", "pairs"]

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-llava"

COMPRESS: dict[str, tuple[str, ...]] = {
    "uncompressed": (),
    "fastv": ("{at: decoder.2, method: fastv, keep: 50%}",),
    "visionzip": ("{at: encoder, method: visionzip, dominant: 88, contextual: 10}",),
    "tome": ("{at: encoder, method: tome, r: 24}",),
    "pool": ("{at: projector, method: pool, kernel: 2, mode: average}",),
    "random": ("{at: projector, method: random, keep: 50%, seed: 0}",),
    "random-kept": ("{at: decoder.0, method: random, keep: 50%, seed: 0}",),
    "downsample": ("{at: input, method: downsample, grid: [10, 10]}",),
    "pyramiddrop": ("{at: decoder.1, method: pyramiddrop, layers: [1, 2, 3], keep: [50%, 25%, 12.5%]}",),
    "tokencarve": ("{at: input, method: downsample, grid: [10, 10]}", "{at: decoder.2, method: tokencarve, keep: 50%}"),
}
"""The shipped recipes' plans, and random selection that leaves the positions alone."""

SELECTING = ("fastv", "random-kept", "pyramiddrop", "tokencarve")
"""Those with a cut inside the decoder, where bucket, chunks and slots could show."""

LEADS = ("", "there are things ,", "there are many things , what is", "there are many things , what is , what is at a1 ?",
         "there are many things , what is , what is at a1 ? what colour is b2 ? how many")  # fmt: skip
"""Words in front of a question: five prompt lengths in one bucket. Every second one stands in front of the picture."""


def _questions() -> list[dict[str, str]]:
    return list(json.loads((EXAMPLES / "pictures" / "questions.json").read_text("utf-8")))


def asked(count: int) -> list[tuple[Any, str]]:
    """PIL pictures and questions: every picture meets every question."""
    from PIL import Image

    rows = _questions()
    numbers = [1 + (n + n // len(rows)) % 6 for n in range(count)]
    return [(Image.open(EXAMPLES / "pictures" / f"scene-{i}.png"), rows[n % len(rows)]["question"]) for n, i in enumerate(numbers)]


class _Writer:
    def __init__(self) -> None:
        self.tokenizer = Tokenizer(MODEL)
        self.rule = Llava.image_rule(read_model_files(MODEL), (112, 112), None)

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def turn(self, names: Sequence[str], question: str, lead: str = "", first: bool = True, before: bool = False):  # type: ignore[no-untyped-def]
        pixels = tuple((0, prepare(load_image(EXAMPLES / "pictures" / name), self.rule)) for name in names)
        pictures = " <image>" * len(names)
        body = f" {lead}{pictures} {question}" if before else f"{pictures} {lead} {question}"
        return pixels, self.ids(("<s>" if first else "</s>") + " USER:" + body + " ASSISTANT:")


def pairs(count: int, leads: Sequence[str] = LEADS) -> list[Script]:
    """One picture and one question each, the leads in turn."""
    writer, asked = _Writer(), _questions()
    scripts = []
    for number in range(count):
        row = asked[number % len(asked)]
        lead = leads[(number + number // len(asked)) % len(leads)]
        turn = writer.turn([row["picture"]], row["question"], lead, before=bool(number % 2))
        scripts.append(Script(f"pair-{number:02d}", (turn,)))
    return scripts


def conversations() -> list[Script]:
    """For a bucket of two pictures: both at once, a second turn without and with a picture, no picture at all."""
    writer = _Writer()
    one, two = ["scene-1.png"], ["scene-2.png"]
    return [
        Script("two-pictures", (writer.turn(one + two, "what is at c4"),)),
        Script("two-pictures-apart", (writer.turn(["scene-3.png", "scene-4.png"], "how many red things", LEADS[1], before=True),)),
        Script("one-of-two", (writer.turn(one, "what is at b1"),)),
        Script("second-turn", (writer.turn(one, "what is at c4"), writer.turn([], "how many digits", first=False))),
        Script("second-picture", (writer.turn(one, "what is at c4"), writer.turn(two, "what colour is d3", first=False))),
        Script("text-only", (writer.turn([], "what is at a1", LEADS[2]),)),
        Script("text-then-picture", (writer.turn([], "how many"), writer.turn(two, "what is at b2", first=False))),
    ]
