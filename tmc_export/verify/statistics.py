"""What a fitting asks of the model: the reference on calibration prompts, its attention looked at and its first answer token compared.

Legend: n candidates of a picture, T tokens, s keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tmc_export.core.errors import ExportError, RuntimeInputError
from tmc_export.families import family_of
from tmc_export.families._contract import ModelFiles
from tmc_export.graphs._contract import Attention, Need, Stage
from tmc_export.graphs._fitting import Visit
from tmc_export.plan.types import Plan
from tmc_export.runtime._chat import ChatTemplate, expand_image_tokens, place_images
from tmc_export.runtime._images import choose_bucket, load_image, prepare
from tmc_export.runtime._text_tower import question_of
from tmc_export.runtime._tokenizer import Tokenizer
from tmc_export.verify._decode import Watcher
from tmc_export.verify._rows import LayerMap, picked_rows
from tmc_export.verify._sequence import Tokens
from tmc_export.verify.reference import Reference

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Calibration", "Question"]


@dataclass(frozen=True)
class Question:
    """A calibration prompt: one picture and what is asked about it."""

    picture: Path
    text: str


@dataclass(frozen=True)
class _Asked:
    """A prompt prepared: the picture with its bucket, ids with one image token, and the question, which text towers read."""

    pixels: NDArray[np.float32]
    bucket: int
    ids: tuple[int, ...]
    text: str


class Calibration:
    """Calibration prompts, and the model that runs them; it is loaded once.

    Args:
        folder: the checkpoint.
        plan: without the entry that is fitted.
        files: the checkpoint's JSON files.
        fit: the recipe's picture rule.
        questions: the prompts, at least one.

    Raises:
        ModelError: the checkpoint cannot be loaded, or its kind has no reference.
        RuntimeInputError: a picture cannot be read, or a question cannot be asked in the model's chat form.
    """

    def __init__(self, folder: Path, plan: Plan, files: ModelFiles, fit: str | None, questions: Sequence[Question]) -> None:
        self.folder, self.plan = folder, plan
        self._asked = _prepare(folder, plan, files, fit, questions)
        self._reference = Reference(folder, plan)
        self._whole: list[Tensor] | None = None

    @property
    def prompts(self) -> int:
        """How many."""
        return len(self._asked)

    def look(self, stages: Sequence[Stage], visit: Visit) -> None:
        """Run every prompt once, with `visit` at each stage; see `Evidence.look`.

        Raises:
            ExportError: a stage that cannot be looked at, or a visitor that drops every candidate or names them in disorder.
        """
        for stage in stages:
            wrong = [n for n in stage.needs if not isinstance(n, Attention) or n.layer != "previous" or n.logits or n.heads == "none"]
            if stage.at.part != "decoder" or not stage.at.layer or wrong:
                raise ExportError(
                    f"fitting cannot look at {wrong or 'nothing'} at {stage.at}; attention of the layer before a cut is shown"
                )
        self._open(self.plan)
        try:
            for number in range(self.prompts):
                watchers: dict[int, Watcher] = {}
                for stage in stages:
                    watchers[(stage.at.layer or 0) - 1] = partial(_look, number, stage, visit)
                self._reference.watch(watchers)
                self._ask(number)
        finally:
            self._reference.watch({})

    def divergence(self, plan: Plan) -> float:
        """`KL(plan || without the entry)` of the first answer token, in nats, the prompts' mean."""
        if self._whole is None:
            self._whole = self._answers(self.plan)
        pairs = zip(self._answers(plan), self._whole, strict=True)
        return sum(float((this.exp() * (this - whole)).sum()) for this, whole in pairs) / self.prompts

    def _answers(self, plan: Plan) -> list[Tensor]:
        """Log-probabilities of the first answer token, per prompt."""
        self._open(plan)
        return [torch.log_softmax(torch.from_numpy(self._ask(number)).double(), -1) for number in range(self.prompts)]

    def _open(self, plan: Plan) -> None:
        if self._reference.plan is not plan:
            self._reference.close()
            self._reference = Reference(self.folder, plan, loaded=self._reference.model)

    def _ask(self, number: int) -> NDArray[np.float32]:
        """The logits of the first answer token."""
        asked = self._asked[number]
        self._reference.reset()
        counts = self._reference.visual_tokens([asked.pixels], [asked.bucket])
        ids, group = expand_image_tokens(asked.ids, self.plan.facts.image_token, counts)
        turn = self._reference.turn([asked.pixels], ids, group.astype(np.int64), max_new_tokens=1, buckets=[asked.bucket], text=asked.text)
        logits: NDArray[np.float32] = turn.logits[0]
        return logits


def _look(number: int, stage: Stage, visit: Visit, layer: LayerMap, tokens: Tokens) -> Tensor | None:
    """Show a visitor the candidates' columns of what a stage needs, and return the rows that go on."""
    candidates = torch.nonzero(tokens.group > 0)[:, 0]
    past = layer.seen.shape[1] - layer.seen.shape[0]
    captured: Mapping[Need, Tensor] = {
        n: picked_rows(layer, n, tokens.group, str(stage.at))[0][..., past + candidates] for n in stage.needs if isinstance(n, Attention)
    }
    kept = visit(number, stage, captured)
    if kept is None:
        return None
    if not kept.numel() or bool((kept.diff() <= 0).any()) or int(kept[0]) < 0 or int(kept[-1]) >= candidates.shape[0]:
        raise ExportError(
            f"a fitting keeps {kept.tolist()} of {candidates.shape[0]} candidates at {stage.at}; ascending indices, at least 1"
        )
    return torch.cat([torch.nonzero(tokens.group == 0)[:, 0], candidates[kept]]).sort().values


def _prepare(folder: Path, plan: Plan, files: ModelFiles, fit: str | None, questions: Sequence[Question]) -> list[_Asked]:
    family = family_of(dict(files.config))
    rules = [family.image_rule(files, v.size, fit) for v in plan.vision]
    text = family.tokens(files).image_text
    tokenizer = Tokenizer(folder)
    template = ChatTemplate.from_folder(folder, tokenizer.special_tokens)
    found: list[_Asked] = []
    for question in questions:
        picture = load_image(question.picture)
        bucket = choose_bucket((picture.height, picture.width), rules)
        if template is None:
            prompt = place_images(question.text, 1, text)
        else:
            prompt = template.render([template.message("user", question.text, 1, text)])
        ids = tuple(tokenizer.encode(prompt))
        if ids.count(plan.facts.image_token) != 1:
            raise RuntimeInputError(
                f"the question {question.text!r} makes a prompt with {ids.count(plan.facts.image_token)} image placeholders; write "
                f"questions without {text}: each gets 1 picture"
            )
        found.append(_Asked(prepare(picture, rules[bucket]), bucket, ids, question_of(question.text, text)))
    return found
