"""Questions answered with some weights rounded, against the same questions in float32: freely, and with float32's choices held.

Legend: v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.api.calibration_data import Sample
from tmc_export.api.eager_session import EagerSession
from tmc_export.api.simulation import Simulation
from tmc_export.core.errors import RecipeError, RuntimeInputError
from tmc_export.surgery.replay import Choices, Kind, replaying, writing_down

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tmc_export.runtime.session import Prompt

    Array = NDArray[Any]

__all__ = ["Answered", "Compared", "Effect", "Measuring", "effect_of", "weaker"]


@dataclass(frozen=True)
class Answered:
    """One question, answered.

    Attributes:
        logits: float32 `[v]` of the first answer token.
        tokens: the greedy answer; the first token alone where no more were asked for.
        kept: place of a selection → per picture, the places in the picture that were kept, in order.
    """

    logits: Array
    tokens: tuple[int, ...]
    kept: Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Compared:
    """One answer beside float32's.

    Attributes:
        signal, noise: squares of float32's first logits, and of what they are off, summed.
        kl: of the first answer token, float32 from this, in nats.
        first: the most likely first token is the same.
        kept: share of float32's kept tokens that are kept here, the mean over selections and pictures; None where nothing is selected.
        answer: the decoded answer is the same; None where only the first token was computed.
        choices: every selection kept the same tokens in the same order.
    """

    signal: float
    noise: float
    kl: float
    first: bool
    kept: float | None
    answer: bool | None
    choices: bool = True


@dataclass(frozen=True)
class Effect:
    """What rounding does over all questions.

    Attributes:
        sqnr_db: of the first answer token's logits, squares summed over the questions; infinite when equal.
        kl: mean, in nats.
        first: questions whose most likely first token is the same.
        kept: mean; None where nothing is selected.
        changed: answers that are others; None where only first tokens were computed.
        samples: questions.
    """

    sqnr_db: float
    kl: float
    first: int
    kept: float | None
    changed: int | None
    samples: int


def effect_of(found: Sequence[Compared]) -> Effect:
    """Sum up."""
    signal, noise = sum(c.signal for c in found), sum(c.noise for c in found)
    kept = [c.kept for c in found if c.kept is not None]
    answers = [c.answer for c in found if c.answer is not None]
    return Effect(
        sqnr_db=float("inf") if noise == 0 else 10 * float(np.log10(signal / noise)) if signal else float("-inf"),
        kl=float(np.mean([c.kl for c in found])),
        first=sum(c.first for c in found),
        kept=float(np.mean(kept)) if kept else None,
        changed=sum(not a for a in answers) if len(answers) == len(found) else None,
        samples=len(found),
    )


def weaker(kinds: Sequence[Mapping[str, Kind]]) -> dict[str, Kind]:
    """Join what several prompts' choices are: of each stage the weakest, `none` before `mix` before `rows`."""
    order: tuple[Kind, ...] = ("rows", "mix", "none")
    found: dict[str, Kind] = {}
    for each in kinds:
        for stage, kind in each.items():
            found[stage] = max(found.get(stage, kind), kind, key=order.index)
    return found


@dataclass(frozen=True)
class _Whole:
    """A question in float32."""

    answered: Answered
    choices: Choices
    laid: Prompt


class Measuring:
    """Questions, and their answers in float32, computed once.

    Args:
        session: on the simulation's backend.
        simulation: says what is rounded.
        samples: the questions.
        tokens: of an answer, at most.
        answers: decode float32's answers; without it first tokens can be compared only.
        progress: called with one line per question.
        before: took the same questions with the same plan, but for its schemes: float32's answers are the same.

    Raises:
        RecipeError: a sample does not fit the recipe's inputs.
    """

    def __init__(
        self,
        session: EagerSession,
        simulation: Simulation,
        samples: Sequence[Sample],
        tokens: int,
        answers: bool,
        progress: Callable[[str], None],
        before: Measuring | None = None,
    ) -> None:
        self._session, self.simulation, self.samples, self._tokens = session, simulation, tuple(samples), tokens
        self._whole: list[_Whole] = []
        self._whole_answers = answers
        self.kinds: dict[str, Kind]
        if before is not None and (before.samples, before._tokens, before._whole_answers) == (self.samples, tokens, answers):
            self._whole = before._whole
            self.kinds = before.kinds
            return
        for number, sample in enumerate(samples, 1):
            progress(f"float32 {number}/{len(samples)}")
            choices = Choices()
            with writing_down(choices):
                answered = self._answer(sample, answers)
            if session.laid is None:
                raise RecipeError(f"{sample.place}: the question was not answered")
            self._whole.append(_Whole(answered, choices, session.laid))
        self.kinds = weaker([w.choices.kinds for w in self._whole])

    @property
    def held(self) -> bool:
        """Whether any stage's choice can be held."""
        return any(kind != "none" for kind in self.kinds.values())

    @property
    def baselines(self) -> tuple[Answered, ...]:
        """The answers in float32."""
        return tuple(w.answered for w in self._whole)

    def compare(self, names: Collection[str], *, frozen: bool, answers: bool) -> list[Compared]:
        """Answer all questions with some weights rounded.

        Args:
            names: what is rounded; see `Simulation.rounding`.
            frozen: stages repeat what they chose in float32.
            answers: decode whole answers; float32's must have been.
        """
        vision = any(
            file.startswith("onnx/vision_") for n in names if n in self.simulation.targets for file in self.simulation.targets[n].files
        )
        found = []
        with self.simulation.rounding(names):
            for sample, whole in zip(self.samples, self._whole, strict=True):
                self._session.reuse = None if vision else whole.laid
                try:
                    if frozen:
                        with replaying(whole.choices):
                            answered = self._answer(sample, answers)
                    else:
                        answered = self._answer(sample, answers)
                finally:
                    self._session.reuse = None
                found.append(_compare(answered, whole.answered, answers))
        return found

    def both(self, names: Collection[str], *, answers: bool) -> tuple[list[Compared], list[Compared] | None]:
        """As `compare`, end to end and with choices held; no second list where no choice can be held.

        Where every stage only keeps rows and kept float32's for every question, the two are one run, which is made once.
        """
        free = self.compare(names, frozen=False, answers=answers)
        if not self.held:
            return free, None
        if all(w.choices.plain for w in self._whole) and all(c.choices for c in free):
            return free, free
        return free, self.compare(names, frozen=True, answers=answers)

    def _answer(self, sample: Sample, answers: bool) -> Answered:
        session = self._session
        images, chat, tokens = [str(p) for p in sample.images], session.template is not None, self._tokens if answers else 1
        try:
            answer = session.generate(images, sample.prompt, chat=chat, max_new_tokens=tokens)
        except (RuntimeInputError, ValueError) as error:
            raise RecipeError(f"{sample.place}: {error}") from error
        if session.laid is None or session.trace is None:
            raise RecipeError(f"{sample.place}: the question was not answered")
        kept = _kept(session, session.laid, answer.kept)
        return Answered(session.trace.logits.reshape(-1).astype(np.float32), answer.tokens, kept)


def _kept(session: EagerSession, laid: Prompt, cuts: Mapping[str, tuple[tuple[int, ...], ...]]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Kept places by selection, brought back through earlier ones to the places of the picture."""
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    stages = len(laid.sources[0]) if laid.sources else 0
    for stage in range(stages):
        found[f"vision.{stage}"] = tuple(tuple(s[stage][s[stage] >= 0].tolist()) for s in laid.sources)
    places = [list(s[-1].tolist()) if stages else list(range(len(t))) for s, t in zip(laid.sources, laid.tokens, strict=True)]
    for cut in session.program.cuts if laid.tokens else ():
        last = places
        for stage in range(len(cut.methods)):
            name = f"{cut.before_block}.{stage}"
            last = [[p[i] if 0 <= i < len(p) else -1 for i in k] for p, k in zip(places, cuts[name], strict=False)]
            found[f"decoder.{cut.layer}.{stage}"] = tuple(tuple(i for i in each if i >= 0) for each in last)
        places = last
    return found


def _compare(got: Answered, want: Answered, answers: bool) -> Compared:
    a, b = got.logits.astype(np.float64), want.logits.astype(np.float64)
    p, q = _log_softmax(b), _log_softmax(a)
    shares = [
        len(set(mine) & set(theirs)) / len(theirs)
        for name, pictures in want.kept.items()
        for mine, theirs in zip(got.kept[name], pictures, strict=True)
        if theirs
    ]
    return Compared(
        signal=float((b * b).sum()),
        noise=float(np.square(a - b).sum()),
        kl=max(0.0, float((np.exp(p) * (p - q)).sum())),
        first=int(a.argmax()) == int(b.argmax()),
        kept=float(np.mean(shares)) if shares else None,
        answer=got.tokens == want.tokens if answers else None,
        choices=got.kept == want.kept,
    )


def _log_softmax(logits: Array) -> Array:
    x = logits - logits.max()
    result: Array = x - np.log(np.exp(x).sum())
    return result
