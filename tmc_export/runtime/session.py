"""A loaded bundle: answers questions about pictures, streams, keeps a conversation. Loads once, answers many frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.manifest import Manifest
from tmc_export.bundle.read import check_files, open_manifest
from tmc_export.core.errors import RuntimeInputError
from tmc_export.core.image_rule import ImageRule
from tmc_export.runtime._backend import Backend, BackendOptions, open_backend, options_for
from tmc_export.runtime._chat import ChatTemplate, expand_image_tokens
from tmc_export.runtime._conversation import Conversation
from tmc_export.runtime._decoder import Decoder, Route, TurnTrace
from tmc_export.runtime._images import ImageLike, choose_bucket, load_image, prepare
from tmc_export.runtime._mrope import mrope_positions
from tmc_export.runtime._sampling import Sampler, Sampling, StopStrings
from tmc_export.runtime._text_tower import TextTowers
from tmc_export.runtime._tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Answer", "Prompt", "Sampling", "Session", "Timings", "load"]

_HASHED_BYTES = 64 << 20
"""Files up to this size are hashed at every load; larger ones only by `verify`, their size always."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds.

    Attributes:
        vision_ms: pictures prepared and encoded.
        first_token_ms: from the prompt to the first token, vision included.
        token_ms: median of the later tokens; 0 when there was none.
    """

    vision_ms: float
    first_token_ms: float
    token_ms: float


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without special tokens.
        tokens: ids, the end token included where one came.
        finish: `eos`, `length`, `stop` (a stop string) or `context` (no slot is free).
        prompt_tokens: tokens of the turn as the decoder got them, visual tokens included.
        visual_tokens: visual tokens after each block's cut, block by block.
        kept: `"<block>.<stage>"` → per picture, the kept places among the tokens that arrived there; -1 = a synthetic token.
        timings: see `Timings`.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    visual_tokens: tuple[int, ...]
    kept: dict[str, tuple[tuple[int, ...], ...]]
    timings: Timings


@dataclass(frozen=True)
class Prompt:
    """A turn, encoded: what the decoder takes.

    Attributes:
        ids: int64 `[n]`, one image token id per visual token.
        group: int `[n]`.
        positions: int64 `[r, n]`.
        next_position: after the turn.
        pixels: per picture, the prepared input, with its bucket.
        tokens: per picture, visual tokens `[v, c]`.
        sources: per picture, per vision stage, `[k]`.
        states: per picture, what its vision graph hands to cuts, by the name of the output: `[1, …]`.
        texts: per picture, what text towers made of its question: `text.<n>` → `[1, width]`.
    """

    ids: Array
    group: Array
    positions: Array
    next_position: int
    pixels: tuple[tuple[int, Array], ...]
    tokens: tuple[Array, ...] = ()
    sources: tuple[tuple[Array, ...], ...] = ()
    states: tuple[Mapping[str, Array], ...] = ()
    texts: tuple[Mapping[str, Array], ...] = ()


class Session:
    """A bundle that is ready to answer; made by `load`.

    Attributes:
        folder, manifest, program: the bundle.
        decoder: blocks and slots of the conversation.
        tokenizer, template: text side; `template` is None where the model has none.
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: str | Backend, options: BackendOptions) -> None:
        self.folder, self.manifest, self.program = folder, manifest, manifest.program
        self._backend = open_backend(backend, folder, options) if isinstance(backend, str) else backend
        self.decoder = Decoder(self.program, self._backend)
        self.tokenizer = Tokenizer(folder / "model")
        self.template = ChatTemplate.from_folder(folder / "model", self.tokenizer.special_tokens)
        self._rules = [ImageRule.from_json(dict(v.rule)) for v in self.program.vision]
        self._conversation = Conversation(self.tokenizer, self.template, self.program.image_text, self.program.eos)
        for vision in self.program.vision:
            self._backend.graph(vision.file)
        self._towers = TextTowers(self.program.towers, folder, self._backend)
        self.decoder.graphs()

    def reset(self) -> None:
        """Start a new conversation."""
        self.decoder.reset()
        self._conversation.reset()

    # ------------------------------------------------------------------------------------------------------- inputs
    def encode_images(self, images: Sequence[ImageLike]) -> tuple[tuple[int, Array], ...]:
        """Prepare pictures: paths, PIL pictures or arrays → (bucket, `[1, …]` input) each.

        Raises:
            RuntimeInputError: too many pictures, or one that cannot be read.
        """
        if len(images) > self.program.images:
            raise RuntimeInputError(
                f"{len(images)} pictures given, the bundle takes {self.program.images}; build with inputs.images: {len(images)}"
            )
        found = []
        for source in images:
            image = load_image(source)
            bucket = choose_bucket((image.height, image.width), self._rules)
            found.append((bucket, prepare(image, self._rules[bucket])[None].astype(self.program.dtype)))
        return tuple(found)

    def prompt(self, ids: Sequence[int], pixels: Sequence[tuple[int, Array]], questions: Sequence[str] = ()) -> Prompt:
        """Encode a turn's pictures and lay out its tokens.

        Args:
            ids: text ids with one image token per picture.
            pixels: from `encode_images`.
            questions: per picture, the user's text that it came with; only read where the bundle has text towers.
        """
        tokens, sources, states = [], [], []
        texts = self._towers.embed(questions, len(pixels))
        for (bucket, array), text in zip(pixels, texts, strict=True):
            vision = self.program.vision[bucket]
            out = self._backend.graph(vision.file).run({"pixels": array, **text})
            tokens.append(out["tokens"][0])
            sources.append(tuple(out[f"source.{n}"][0] for n in range(len(vision.stages))))
            states.append({s.output: out[s.output] for s in vision.states})
        if not ids:
            raise RuntimeInputError("the prompt is empty; write a question")
        expanded, group = expand_image_tokens(ids, self.program.image_token, [t.shape[0] for t in tokens])
        positions, following = self._positions(group, [b for b, _ in pixels], sources)
        return Prompt(expanded, group, positions, following, tuple(pixels), tuple(tokens), tuple(sources), tuple(states), tuple(texts))

    def _positions(self, group: Array, buckets: Sequence[int], sources: Sequence[tuple[Array, ...]]) -> tuple[Array, int]:
        """Rotary positions of a turn; tokens that form no raster any more keep the place of the token they come from."""
        start, count = self.decoder.next_position, group.shape[0]
        if self.program.position_rule == "sequential":
            return np.broadcast_to(start + np.arange(count), (self.program.rope_axes, count)), start + count
        grids: list[tuple[int, int, int]] = []
        places: list[Array] = []
        whole: list[Array] = []
        for picture, bucket in enumerate(buckets):
            vision = self.program.vision[bucket]
            rows, columns = vision.grid or vision.full_grid
            grids.append((1, rows, columns))
            if not vision.grid and (sources[picture][-1] < 0).any():
                raise RuntimeInputError(
                    f"the method '{vision.stages[-1]}' makes tokens that come from no place of the picture, and this model's positions "
                    "count rows and columns; build with a method that keeps the raster, such as pool, or at a decoder site"
                )
            places.append(np.arange(rows * columns) if vision.grid else sources[picture][-1])
        ends: list[int] = [0, *(np.flatnonzero(np.diff(group)) + 1), count]  # borders of the runs of one picture or of text
        kept: list[Array] = []
        for begin, end in zip(ends[:-1], ends[1:], strict=True):
            picture = int(group[begin]) - 1
            size = int(end - begin) if picture < 0 else grids[picture][1] * grids[picture][2]
            offset = sum(part.shape[0] for part in whole)
            kept.append(offset + (np.arange(size) if picture < 0 else places[picture]))
            whole.append(np.full(size, picture + 1))
        found = mrope_positions(np.concatenate(whole), grids, start)
        return found.positions[:, np.concatenate(kept)], found.next_position

    def run_prompt(self, prompt: Prompt, route: Route = "auto") -> TurnTrace:
        """Put the visual tokens in place and run the turn through the decoder."""
        ids = np.where(prompt.group > 0, 0, prompt.ids)
        hidden = self.decoder.embed(ids)
        for picture, tokens in enumerate(prompt.tokens):
            hidden[prompt.group == picture + 1] = tokens
        return self.decoder.turn(hidden, prompt.positions, prompt.group, prompt.next_position, route, self._states(prompt))

    def _states(self, prompt: Prompt) -> dict[str, Array]:
        """What the vision graphs and text towers hand to cuts, one item per picture of the bucket; a missing picture's is zero."""
        found: dict[str, Array] = {}
        for state in self.program.vision[0].states if prompt.tokens else ():
            parts = [given[state.output] for given in prompt.states]
            empty = np.zeros((self.program.images - len(parts), *state.shape[1:]), state.dtype)
            found[state.input] = np.concatenate([*parts, empty])
        for name in prompt.texts[0] if prompt.texts else ():
            rows = [text[name] for text in prompt.texts]
            found[name] = np.concatenate([*rows, *[np.zeros_like(rows[0])] * (self.program.images - len(rows))])
        return found

    # ------------------------------------------------------------------------------------------------------ answers
    def generate(
        self,
        images: Sequence[ImageLike] = (),
        prompt: str = "",
        *,
        chat: bool = True,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer one question in a conversation of its own; see `turn`."""
        self.reset()
        return self.turn(images, prompt, chat=chat, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, on_text=on_text)

    def turn(
        self,
        images: Sequence[ImageLike] = (),
        prompt: str = "",
        *,
        chat: bool = True,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        route: Route = "auto",
    ) -> Answer:
        """Answer in the running conversation.

        Args:
            images: paths, PIL pictures, or uint8/float arrays `[h, w, 3]`.
            prompt: the question.
            chat: use the model's chat template (a model without one takes the prompt as it is).
            max_new_tokens: tokens at most; None: what the bundle was built for.
            sampling: greedy when None.
            stop: texts that end the answer and are cut off.
            on_text: called with each new piece of text.
            route: see `Decoder.turn`.

        Raises:
            RuntimeInputError: pictures or text that the bundle cannot take. After this or any other exception, an interrupt or one of
                `on_text` included, the conversation is as it was before the turn.
        """
        began = time.perf_counter()
        limit = self.program.new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise RuntimeInputError(f"max_new_tokens is {limit}; give 1 or more")
        sampler, stops = Sampler(sampling or Sampling()), StopStrings(stop)
        pixels = self.encode_images(images)
        ids, asked = self._conversation.ask(prompt, pixels, chat)
        questions = asked.questions[len(asked.questions) - len(pixels) :]
        mark = self.decoder.mark()
        try:
            if self.program.turns == "recompute":
                self.decoder.reset()
                ids, pixels, questions = list(asked.fed), asked.pixels, asked.questions
            laid = self.prompt(ids, pixels, questions)
            seen = time.perf_counter()
            trace = self.run_prompt(laid, route)
            tokens, text, finish, times = self._decode(trace.logits, limit, sampler, stops, on_text)
        except BaseException:
            self.decoder.rewind(mark)
            raise
        self._conversation.answer(asked, text, tokens)
        first = times[0] - began
        later = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        timings = Timings(vision_ms=(seen - began) * 1e3, first_token_ms=first * 1e3, token_ms=later * 1e3)
        return Answer(text, tuple(tokens), finish, int(laid.ids.shape[0]), self._visual(laid, trace), self._kept(trace), timings)

    def _decode(
        self, logits: Array, limit: int, sampler: Sampler, stops: StopStrings, on_text: Callable[[str], None] | None
    ) -> tuple[list[int], str, str, list[float]]:
        stream, tokens, shown, times = self.tokenizer.stream(), [], [], []
        finish = "length"

        def show(piece: str) -> None:
            if piece:
                shown.append(piece)
                if on_text is not None:
                    on_text(piece)

        while True:
            token = sampler.pick(logits)
            times.append(time.perf_counter())
            tokens.append(token)
            if token in self.program.eos:
                finish = "eos"
                break
            show(stops.push(stream.push(token)))
            if stops.stopped is not None:
                finish = "stop"
                break
            if len(tokens) >= limit:
                break
            if self.decoder.room() < 1:
                finish = "context"
                break
            logits = self.decoder.step(token, keep=False)
        if stops.stopped is None:
            show(stops.push(stream.finish()))
            show(stops.finish())
        return tokens, "".join(shown), finish, times

    def _visual(self, prompt: Prompt, trace: TurnTrace) -> tuple[int, ...]:
        return (int((prompt.group > 0).sum()), *trace.visual) if prompt.tokens else ()

    def _kept(self, trace: TurnTrace) -> dict[str, tuple[tuple[int, ...], ...]]:
        found: dict[str, tuple[tuple[int, ...], ...]] = {}
        for (block, stage), places in trace.kept.items():
            cut = self.program.cut_before(block)
            each = (cut.visual_in if cut else 0) // max(self.program.images, 1)
            pictures: list[list[int]] = [[] for _ in range(self.program.images)]
            rows = max(places.shape[0] // max(self.program.images, 1), 1)
            for row, place in ((n, int(p)) for n, p in enumerate(places) if p != -1):  # -2: synthetic, of the picture whose row it is
                pictures[place // each if place >= 0 else row // rows].append(place % each if place >= 0 else -1)
            found[f"{block}.{stage}"] = tuple(tuple(p) for p in pictures)
        return found


def load(
    folder: str | Path, *, backend: str = "onnxruntime", threads: int | None = None, int4_accuracy: int = 4, provider: str = "cpu"
) -> Session:
    """Open a bundle.

    Args:
        folder: the bundle.
        backend: `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
        threads: threads of the CPU path; None: its own choice.
        int4_accuracy: how the CPU path multiplies int4 and int8 weights: 4 rounds activations to int8 (fast), 1 keeps them (what a device
            computes).
        provider: what onnxruntime uses: `cpu`, `cuda` or `tensorrt`.

    Raises:
        BundleError: files are missing or damaged.
        RuntimeInputError: the backend does not execute the bundle's weights.
        TmcError: as `open_backend`.
    """
    path = Path(folder)
    manifest = open_manifest(path)
    if backend == "onnxruntime" and "nvfp4" in manifest.schemes:
        raise RuntimeInputError(
            f"{path} has nvfp4 weights, which onnxruntime's CPU path does not execute; run its engines on the device, or build it with "
            "quantize.decoder.weights: int4 or int8"
        )
    small = [name for name, entry in manifest.files.items() if entry.size <= _HASHED_BYTES and not name.startswith("engines/")]
    check_files(path, manifest, sizes_only=True)
    check_files(path, manifest, small)
    options = options_for(manifest.program, threads, int4_accuracy, provider)
    return Session(path, manifest, backend, options)
