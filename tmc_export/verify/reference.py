"""The reference path: the Hugging Face model with its own eager attention, unpadded, with the plan's methods applied at their sites.

It shares nothing with `surgery`: layers are the model's own and are called one by one, the cache and the masks are explicit, and a
method is called on exactly the candidates it decides over, one picture at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from tmc_export.bundle.program import SlotCodes
from tmc_export.core.errors import RuntimeInputError
from tmc_export.graphs._contract import Need
from tmc_export.plan.types import Plan, VisionPlan
from tmc_export.verify._decode import Decoder, Watcher
from tmc_export.verify._learned import MethodWeights
from tmc_export.verify._positions import rotary_positions
from tmc_export.verify._see import Seen, see
from tmc_export.verify._text_towers import TextTowers
from tmc_export.verify._towers import ReferenceModel, load_model
from tmc_export.verify._trace import BlockTrace, ReferenceTurn, StageTrace
from tmc_export.verify.tolerances import margin_bound, precision_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BlockTrace", "Reference", "ReferenceTurn", "StageTrace"]


@dataclass
class _History:
    """Everything fed so far, for `turns: recompute`."""

    ids: Tensor
    group: Tensor
    pictures: list[Seen]
    buckets: list[VisionPlan]


class Reference:
    """A conversation with the model under a plan.

    Args:
        model_folder: a Hugging Face checkpoint.
        plan: what to compress where; a plan without stages gives the model itself.
        dtype: `float32`, or `float16` to look at half-precision arithmetic.
        trace: report the prompt at every block (`ReferenceTurn.blocks`).
        loaded: the `model` of a closed reference, of this dtype, to be used again.
        codes: the bundle keeps keys and values as codes: so does the reference, and attention sees them rounded. Its weights never are.

    Raises:
        ModelError: the checkpoint cannot be loaded, or its kind has no reference.
    """

    def __init__(
        self,
        model_folder: Path,
        plan: Plan,
        *,
        dtype: Literal["float32", "float16"] = "float32",
        trace: bool = False,
        loaded: ReferenceModel | None = None,
        codes: SlotCodes | None = None,
    ) -> None:
        self.plan = plan
        self.dtype = torch.float16 if dtype == "float16" else torch.float32
        self.model = load_model(Path(model_folder), self.dtype) if loaded is None else loaded
        self.noise = margin_bound(precision_of(plan))
        self._learned = MethodWeights(self.dtype)
        self._texts = TextTowers(plan, self.dtype)
        self._decoder = Decoder(self.model, plan, self.noise, trace, self._learned, codes)
        self.reset()

    def watch(self, watchers: Mapping[int, Watcher]) -> None:
        """Show the decoder's attention to functions, see `Decoder.watch`."""
        self._decoder.watch(watchers)

    def close(self) -> None:
        """Leave the loaded model to another reference; this one answers no more."""
        self._decoder.close()

    def reset(self) -> None:
        """Begin a new conversation."""
        self._decoder.reset()
        empty = torch.zeros(0, dtype=torch.int64)
        self._history = _History(empty, empty, [], [])

    @torch.no_grad()
    def turn(
        self,
        pixels: Sequence[NDArray[np.float32]],
        input_ids: NDArray[np.int64],
        group: NDArray[np.int64],
        positions: NDArray[np.int64] | None = None,
        max_new_tokens: int = 16,
        forced: Sequence[int] | None = None,
        until_eos: bool = True,
        buckets: Sequence[int] | None = None,
        text: str = "",
    ) -> ReferenceTurn:
        """Answer one turn greedily, or along `forced`.

        Args:
            pixels: this turn's pictures, each prepared for its bucket: `[3, H, W]`, or patches `[n, values]`.
            input_ids: `[T]`, one id for every visual token (after the projector's stages); from the second turn on beginning with the last
                token of the turn before, which has not been fed.
            group: `[T]` 0 for text, p for a visual token of the p-th picture of this turn.
            positions: `[r, T]` rotary positions; the model's own when left out.
            max_new_tokens: most tokens of the answer.
            forced: take these as the answer instead of the most likely ones (teacher forcing); `max_new_tokens` is then not read.
            until_eos: stop at an end token; without it, `max_new_tokens` are answered in any case.
            buckets: index of each picture's bucket; found by its shape when left out.
            text: what the user says in this turn, which text towers read when it brings pictures.

        Raises:
            RuntimeInputError: the ids, groups and pictures do not belong together.
            ExportError: a method returned something else than its layout promises, or asks for what the reference does not capture.
        """
        plans = self.buckets(pixels, buckets)
        inputs = [torch.from_numpy(p)[None].to(self.dtype) for p in pixels]
        pairs = enumerate(zip(plans, inputs, strict=True), start=1)
        embedded = self._texts.of(text) if inputs else {}
        asked: dict[Need, Tensor] = {need: embedded[tower.index] for need, tower in self._texts.needs.items()} if inputs else {}
        seen = [see(self.model.tower, v, p, i, self.noise, self._learned, asked) for i, (v, p) in pairs]
        ids, groups = torch.from_numpy(np.asarray(input_ids, np.int64)), torch.from_numpy(np.asarray(group, np.int64))
        _check(ids, groups, seen)
        shown, shown_plans = list(seen), list(plans)
        if self.plan.turns == "recompute":
            past = self._history
            offset = len(past.pictures)
            ids, groups = torch.cat([past.ids, ids]), torch.cat([past.group, torch.where(groups > 0, groups + offset, 0)])
            shown, shown_plans = past.pictures + seen, past.buckets + plans
            self._decoder.reset()
        decoder = self._decoder
        decoder.stages, decoder.blocks = [], []
        start = decoder.next_position.get(-1, 0)
        rotary = rotary_positions(self.model.whole, groups, shown_plans, shown, start)
        if positions is not None:
            rotary = torch.from_numpy(np.asarray(positions, np.int64)), int(np.max(positions)) + 1
        ends = self.model.eos if until_eos and forced is None else ()
        logits, answer, prompt = self._answer(ids, groups, shown, rotary, max_new_tokens if forced is None else len(forced), forced, ends)
        said = torch.zeros(max(len(answer) - 1, 0), dtype=torch.int64)
        self._history = _History(
            torch.cat([ids, torch.tensor(answer[:-1], dtype=torch.int64)]), torch.cat([groups, said]), shown, shown_plans
        )
        return ReferenceTurn(
            tokens=tuple(answer),
            logits=np.stack([row.numpy() for row in logits]),
            vision=tuple(s.tokens[0].float().numpy() for s in seen),
            stages=(*(t for s in seen for t in s.traces), *decoder.stages),
            blocks=tuple(decoder.blocks),
            cache_rows=tuple(int(o.shape[0]) for o in decoder.cache.orders),
            positions=prompt,
            texts={index: value[0].float().numpy() for index, value in embedded.items()},
        )

    def buckets(self, pixels: Sequence[NDArray[np.float32]], chosen: Sequence[int] | None = None) -> list[VisionPlan]:
        """Return the bucket of each prepared picture: the chosen one, or the one whose pictures have this shape.

        Raises:
            RuntimeInputError: no bucket, or several, take a picture of this shape.
        """
        shapes = [self.model.tower.shape(v) for v in self.plan.vision]
        found: list[VisionPlan] = []
        for number, picture in enumerate(pixels):
            fitting = [i for i, s in enumerate(shapes) if s == picture.shape and (chosen is None or chosen[number] == i)]
            if len(fitting) != 1:
                sizes = ", ".join(f"{i}: {list(s)}" for i, s in enumerate(shapes)) or "none"
                what = "no bucket" if not fitting else f"buckets {fitting}; say which"
                raise RuntimeInputError(f"a picture of shape {list(picture.shape)} fits {what}; the plan's buckets take: {sizes}")
            found.append(self.plan.vision[fitting[0]])
        return found

    def visual_tokens(self, pixels: Sequence[NDArray[np.float32]], buckets: Sequence[int] | None = None) -> list[int]:
        """Return how many ids each prepared picture takes in a prompt."""
        return [v.tokens for v in self.buckets(pixels, buckets)]

    def _answer(
        self,
        ids: Tensor,
        group: Tensor,
        pictures: Sequence[Seen],
        rotary: tuple[Tensor, int] | None,
        steps: int,
        forced: Sequence[int] | None,
        ends: Sequence[int],
    ) -> tuple[list[Tensor], list[int], NDArray[np.int64]]:
        """Prefill, then one token at a time, up to `steps` tokens or one of `ends`; also the prompt's positions."""
        decoder = self._decoder
        hidden, source = decoder.embed(ids), torch.full_like(ids, -1)
        for number, picture in enumerate(pictures, start=1):
            hidden[:, group == number] = picture.tokens
            source[group == number] = picture.source[0]
        decoder.turn_visual = torch.arange(decoder.places, decoder.places + ids.shape[0])[group > 0]
        decoder.turn_states = {(e, n): s for n, picture in enumerate(pictures, start=1) for e, s in picture.states.items()}
        decoder.turn_texts = {n: picture.texts for n, picture in enumerate(pictures, start=1)}
        positions, following = (None, None) if rotary is None else rotary
        logits = [decoder.feed(hidden, positions, group, source, select=True, following=following)]
        prompt = decoder.positions.numpy().copy()
        answer: list[int] = []
        while True:
            token = int(logits[-1].argmax()) if forced is None else int(forced[len(answer)])
            answer.append(token)
            if len(answer) >= steps or token in ends:
                return logits, answer, prompt
            one = torch.zeros(1, dtype=torch.int64)
            logits.append(decoder.feed(decoder.embed(one + token), None, one, one - 1, select=False))


def _check(ids: Tensor, group: Tensor, seen: Sequence[Seen]) -> None:
    if ids.dim() != 1 or ids.shape != group.shape or not ids.numel():
        raise RuntimeInputError(f"input_ids {list(ids.shape)} and group {list(group.shape)} must be two rows of one length, not empty")
    for number, picture in enumerate(seen, start=1):
        places, tokens = int((group == number).sum()), int(picture.tokens.shape[1])
        if places != tokens:
            raise RuntimeInputError(f"picture {number} has {tokens} visual tokens, its places in group are {places}; they must be equal")
    if int(group.max()) > len(seen):
        raise RuntimeInputError(f"the prompt has places for picture {int(group.max())}, {len(seen)} pictures were given")
