"""Exact match of tiny-llava on fresh scenes, by kind of question, uncompressed or with visual tokens dropped.

    python evaluate.py --questions 300
    python evaluate.py --questions 300 --drop 0.5
    python evaluate.py --questions 300 --drop 0.5 --renumber

Dropping takes a random part of the visual tokens between projector and decoder. The rest keep the
position ids they had in the whole prompt, or, with --renumber, take 0, 1, 2, … .
"""

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scenes import KINDS, SPLITS, Question, scene
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

__all__ = ["Asked", "Checkpoint", "Drop", "answer", "collect", "wilson"]

NEW_TOKENS = 16  # the longest answer, four cells described, takes 12
NOT_LEARNED = "describe"


@dataclass(frozen=True)
class Asked:
    """A question and the picture it is about."""

    image: Image.Image
    question: Question


@dataclass(frozen=True)
class Drop:
    """Which share of the visual tokens to leave out at random, and whether to renumber the positions."""

    share: float
    renumber: bool = False
    seed: int = 0


class Checkpoint:
    """tiny-llava as transformers loads it."""

    def __init__(self, folder: Path) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder)
        self.end: int = self.processor.tokenizer.eos_token_id

    def inputs(self, batch: Sequence[Asked]) -> Any:
        """Token ids [b, t] and pixels [b, 3, 112, 112]; the questions must be of one length, so nothing is padded."""
        texts = [self.processor.apply_chat_template(_message(asked.question.text), add_generation_prompt=True) for asked in batch]
        return self.processor(text=texts, images=[asked.image for asked in batch], return_tensors="pt")

    def text(self, tokens: Tensor) -> str:
        """New token ids [t] as words, up to the end token."""
        ids = tokens.tolist()
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return " ".join(self.processor.tokenizer.convert_ids_to_tokens(ids))


def _message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def collect(questions: int, seed: int, kinds: Sequence[str] = KINDS, split: str = "heldout") -> list[Asked]:
    """Takes scenes seed, seed + 1, … until each kind has its number of questions.

    Raises:
        ValueError: `questions` is not positive.
    """
    if questions < 1:
        raise ValueError(f"cannot collect {questions} questions a kind; ask for at least 1")
    found: dict[str, list[Asked]] = {kind: [] for kind in kinds}
    while any(len(asked) < questions for asked in found.values()):
        drawn = scene(seed, split)
        seed += 1
        for question in drawn.questions:
            if question.kind in found and len(found[question.kind]) < questions:
                found[question.kind].append(Asked(drawn.image, question))
    return [asked for of_kind in found.values() for asked in of_kind]


@torch.inference_mode()
def answer(checkpoint: Checkpoint, asked: Sequence[Asked], batch: int = 50, drop: Drop | None = None) -> list[str]:
    """Answers greedily; the answers come in the order of the questions."""
    generator = torch.Generator().manual_seed(drop.seed if drop else 0)
    answers = [""] * len(asked)
    for places in _batches(asked, batch):
        inputs = checkpoint.inputs([asked[place] for place in places])
        if drop is None:
            whole = checkpoint.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            new = whole[:, inputs["input_ids"].shape[1] :]
        else:
            new = _generate(checkpoint, *_dropped(checkpoint, inputs, drop, generator))
        for place, tokens in zip(places, new, strict=True):
            answers[place] = checkpoint.text(tokens)
    return answers


def _batches(asked: Sequence[Asked], size: int) -> Iterator[list[int]]:
    """Places of questions of one length, at most `size` at a time."""
    lengths: dict[int, list[int]] = {}
    for place, one in enumerate(asked):
        lengths.setdefault(len(one.question.text.split()), []).append(place)
    for places in lengths.values():
        for start in range(0, len(places), size):
            yield places[start : start + size]


def _dropped(checkpoint: Checkpoint, inputs: Any, drop: Drop, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [b, t - dropped, d] and position ids [b, t - dropped]."""
    model, ids = checkpoint.model, inputs["input_ids"]
    visual = ids[0] == model.config.image_token_index
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    embeddings = model.get_input_embeddings()(ids)
    embeddings[:, visual] = torch.stack(list(features))
    count = int(visual.sum())
    first = int(visual.nonzero()[0])
    keep = max(1, round(count * (1 - drop.share)))
    rows = []
    for _ in ids:
        kept = torch.randperm(count, generator=generator)[:keep].sort().values + first
        rows.append(torch.cat([torch.arange(first), kept, torch.arange(first + count, ids.shape[1])]))
    positions = torch.stack(rows)  # [b, t - dropped]
    embeddings = embeddings.gather(1, positions[..., None].expand(-1, -1, embeddings.shape[-1]))
    return embeddings, torch.arange(positions.shape[1]).expand_as(positions) if drop.renumber else positions


def _generate(checkpoint: Checkpoint, embeddings: Tensor, positions: Tensor) -> Tensor:
    """Greedy new token ids [b, t]; decoding goes on from each row's last position."""
    model, cache, new = checkpoint.model, None, []
    done = torch.zeros(len(embeddings), dtype=torch.bool)
    # Without mask and cache, transformers takes a gap in the positions for several packed sequences.
    seen = torch.ones(embeddings.shape[:2], dtype=torch.long)
    for _ in range(NEW_TOKENS):
        out = model.model.language_model(
            inputs_embeds=embeddings, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
        )
        token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        new.append(token)
        done |= token == checkpoint.end
        if done.all():
            break
        cache, embeddings, positions = out.past_key_values, model.get_input_embeddings()(token)[:, None], positions[:, -1:] + 1
        seen = torch.cat([seen, seen[:, :1]], 1)
    return torch.stack(new, 1)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share; 95 % unless told.

    >>> tuple(round(bound, 3) for bound in wilson(90, 100))
    (0.826, 0.945)
    """
    share = right / total
    centre = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - reach) / scale, (centre + reach) / scale


def report(asked: Sequence[Asked], answers: Sequence[str]) -> str:
    """A Markdown table: kind, questions, exact match, interval."""
    right = {kind: [a == b.question.answer for a, b in zip(answers, asked, strict=True) if b.question.kind == kind] for kind in KINDS}
    right = {kind: marks for kind, marks in right.items() if marks}
    learned = [mark for kind, marks in right.items() if kind != NOT_LEARNED for mark in marks]
    if learned:
        right[f"all but {NOT_LEARNED}"] = learned
    lines = ["| kind | questions | exact match | 95 % interval |", "|---|---|---|---|"]
    for kind, marks in right.items():
        low, high = wilson(sum(marks), len(marks))
        lines.append(f"| {kind} | {len(marks)} | {sum(marks) / len(marks):.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share; give 0 or more and less than 1, such as 0.5")
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="checkpoint folder (default: this one)")
    parser.add_argument("--questions", type=int, default=300, help="questions of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--split", choices=list(SPLITS), default="heldout")
    parser.add_argument("--seed", type=int, default=0, help="first scene, and seed of the random drop")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--drop", type=_share, help="share of the visual tokens to leave out at random")
    parser.add_argument("--renumber", action="store_true", help="with --drop: position ids 0, 1, 2, … instead of the original ones")
    parser.add_argument("--shuffle", action="store_true", help="ask about another scene's picture: what answers without looking reach")
    arguments = parser.parse_args()
    if arguments.renumber and arguments.drop is None:
        parser.error("--renumber needs --drop, such as --drop 0.5")
    return arguments


def main() -> None:
    """Collects questions, answers them, prints the table."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    asked = collect(arguments.questions, arguments.seed, arguments.kinds, arguments.split)
    shown = asked
    if arguments.shuffle:
        images = [one.image for one in asked]
        random.Random(arguments.seed).shuffle(images)
        shown = [Asked(image, one.question) for image, one in zip(images, asked, strict=True)]
    drop = None if arguments.drop is None else Drop(arguments.drop, arguments.renumber, arguments.seed)
    print(report(asked, answer(Checkpoint(arguments.model), shown, arguments.batch, drop)))


if __name__ == "__main__":
    main()
