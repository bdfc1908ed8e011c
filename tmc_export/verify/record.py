"""Conversations for the parity ladder: made from the plan's numbers, answered by the reference, recorded into the bundle.

The inputs are made up (seeded pictures, and the checkpoint's own chat form or random text), so that any model can be recorded without data;
what they prove is that two paths compute the same, not that the answers are good.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tmc_export.bundle.program import SlotCodes
from tmc_export.core.image_rule import ImageRule
from tmc_export.families import family_of
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.types import Plan
from tmc_export.runtime._chat import ChatTemplate, expand_image_tokens
from tmc_export.runtime._images import ImageLike, choose_bucket, load_image, prepare
from tmc_export.runtime._tokenizer import Tokenizer
from tmc_export.verify.recorded import FOLDER, Case, CaseTurn, write_case

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tmc_export.verify.reference import Reference

__all__ = ["Script", "answer", "made_up_scripts", "record"]

STEPS = 8
"""Tokens answered per turn."""
_QUESTIONS = ("What is in the picture?", "How many things are there?", "Which colour is it?")


@dataclass(frozen=True)
class Script:
    """A conversation before it is answered: per turn, the pictures with their buckets, and the text ids (one image token per picture).

    `texts` are the user's words of each turn, which text towers read; where left out, of every turn none.
    """

    name: str
    turns: tuple[tuple[tuple[tuple[int, NDArray[np.float32]], ...], tuple[int, ...]], ...]
    texts: tuple[str, ...] = ()


class _Writer:
    """Pictures and prompts for one model."""

    def __init__(self, folder: Path, plan: Plan, files: ModelFiles, fit: str | None) -> None:
        family = family_of(dict(files.config))
        self.plan = plan
        self.rules: list[ImageRule] = [family.image_rule(files, v.size, fit) for v in plan.vision]
        self.image, self.eos = family.tokens(files).image, family.tokens(files).eos
        self.image_text = family.tokens(files).image_text
        self.tokenizer = Tokenizer(folder)
        self.template = ChatTemplate.from_folder(folder, self.tokenizer.special_tokens)
        self.draw = np.random.default_rng(0)

    def picture(self, image: ImageLike | None = None) -> tuple[int, NDArray[np.float32]]:
        """Prepare a picture for its bucket; without one, a made-up one: soft colours, and noise so that no two tokens are alike."""
        if image is None:
            rule = self.rules[int(self.draw.integers(len(self.rules)))]
            coarse = self.draw.uniform(0, 255, (8, 8, 3))
            rows = np.arange(rule.height) * 8 // rule.height
            columns = np.arange(rule.width) * 8 // rule.width
            fine = self.draw.uniform(0, 255, (rule.height, rule.width, 3))
            image = (0.8 * coarse[rows][:, columns] + 0.2 * fine).astype(np.uint8)
        loaded = load_image(image)
        bucket = choose_bucket((loaded.height, loaded.width), self.rules)
        return bucket, prepare(loaded, self.rules[bucket])

    def noise(self, count: int) -> list[int]:
        """Random text ids: neither special nor an image token."""
        found: list[int] = []
        while len(found) < count:
            token = int(self.draw.integers(self.plan.facts.decoder.vocabulary))
            if token not in (self.image, *self.eos) and not self.tokenizer.is_special(token):
                found.append(token)
        return found

    def ask(self, question: str, pictures: int, room: int) -> tuple[int, ...]:
        """Write a first turn in the model's chat form; random text when there is none or it does not fit `room`."""
        if self.template is not None:
            text = self.template.render([self.template.message("user", question, pictures, self.image_text)])
            ids = self.tokenizer.encode(text)
            if len(ids) - pictures <= room and ids.count(self.image) == pictures:
                return tuple(ids)
        return self.random(pictures, room)

    def said(self, ids: Sequence[int]) -> str:
        """The words of a turn, for text towers."""
        return self.tokenizer.decode([i for i in ids if i != self.image]).strip()

    def random(self, pictures: int, room: int) -> tuple[int, ...]:
        """Random text around the pictures, `room` tokens long."""
        head = max(1, room // 3)
        middle = [i for p in range(pictures) for i in ([self.image, *self.noise(1)] if p < pictures - 1 else [self.image])]
        return (*self.noise(head), *middle, *self.noise(max(1, room - head - max(pictures - 1, 0))))


def made_up_scripts(
    folder: Path, plan: Plan, files: ModelFiles, fit: str | None = None, pictures: Sequence[ImageLike] = ()
) -> list[Script]:
    """Write conversations that fit a plan: short and long prompts, several pictures, later turns, no picture.

    Args:
        folder: the checkpoint, for its tokenizer.
        plan: how many pictures and tokens a conversation may bring.
        files: the checkpoint's JSON files.
        fit: the recipe's picture rule.
        pictures: use these before made-up ones.
    """
    writer, room = _Writer(folder, plan, files, fit), plan.text_tokens
    given = list(pictures)

    def shown(count: int) -> tuple[tuple[int, NDArray[np.float32]], ...]:
        return tuple(writer.picture(given.pop(0) if given else None) for _ in range(count))

    scripts = [Script("text", (((), writer.random(0, max(2, room // 4))),))]
    if not plan.images:
        return scripts
    scripts.append(Script("one", ((shown(1), writer.ask(_QUESTIONS[0], 1, room)),)))
    scripts.append(Script("short", ((shown(1), writer.random(1, 2)),)))
    scripts.append(Script("full", ((shown(1), writer.random(1, room)),)))
    if plan.images > 1:
        scripts.append(Script("pictures", ((shown(plan.images), writer.ask(_QUESTIONS[1], plan.images, room)),)))
    part = (room if plan.turns == "freeze" else room - 2 * STEPS) // 4  # recomputed turns are one prompt, with the answers in it
    if part >= 3 and plan.new_tokens >= 3:
        later = ((shown(1), writer.random(1, part)),) if plan.images > 1 else ()
        scripts.append(Script("turns", ((shown(1), writer.random(1, part)), *later, ((), writer.random(0, part)))))
    return [replace(s, texts=tuple(writer.said(ids) for _, ids in s.turns)) if plan.towers else s for s in scripts]


def answer(reference: Reference, script: Script, plan: Plan, steps: int = STEPS) -> Case:
    """Let the reference answer a conversation; it answers on past an end token, so that every turn has its steps."""
    reference.reset()
    turns: list[CaseTurn] = []
    share = max(1, min(steps, plan.new_tokens // len(script.turns)))
    texts = script.texts or ("",) * len(script.turns)
    for (pictures, ids), text in zip(script.turns, texts, strict=True):
        buckets, pixels = tuple(b for b, _ in pictures), tuple(p for _, p in pictures)
        carried = (turns[-1].expected.tokens[-1], *ids) if turns else ids
        expanded, group = expand_image_tokens(carried, plan.facts.image_token, reference.visual_tokens(pixels, buckets))
        found = reference.turn(pixels, expanded, group.astype(np.int64), max_new_tokens=share, until_eos=False, buckets=buckets, text=text)
        turns.append(CaseTurn(pixels, buckets, carried, found, text))
    return Case(script.name, tuple(turns))


def record(
    folder: Path,
    plan: Plan,
    files: ModelFiles,
    bundle: Path,
    fit: str | None = None,
    pictures: Sequence[ImageLike] = (),
    *,
    codes: SlotCodes | None = None,
    there: Collection[str] = (),
    wrote: Callable[[str], None] = lambda file: None,
) -> list[str]:
    """Answer made-up conversations with the reference and write them into `<bundle>/parity/`.

    Args:
        folder: the checkpoint.
        plan: the bundle's plan.
        files: the checkpoint's JSON files.
        bundle: the bundle, or the folder it is being made in.
        fit: the recipe's picture rule.
        pictures: use these before made-up ones.
        codes: how the bundle keeps keys and values.
        there: names of files within the bundle that hold their conversation already; it is not answered again.
        wrote: told of every file that was written, by its name within the bundle.

    Returns:
        Names of the files within the bundle.

    Raises:
        ModelError: the checkpoint cannot be loaded, or its kind has no reference.
    """
    from tmc_export.verify.reference import Reference

    scripts = {f"{FOLDER}/{s.name}.npz": s for s in made_up_scripts(folder, plan, files, fit, pictures)}
    todo = [name for name in scripts if name not in there]
    if todo:
        reference = Reference(folder, plan, codes=codes)
        for name in todo:
            write_case(bundle / FOLDER, answer(reference, scripts[name], plan))
            wrote(name)
    return list(scripts)
