"""Trains tiny-llava from scratch on the CPU.

    OMP_NUM_THREADS=1 python train.py --out my-tiny-llava

1. The tower alone learns what each patch shows, from dense labels.
2. The projector starts from whitened features and a least-squares fit onto word embeddings. Without
   this start the decoder stayed at chance on "what is at …" for more than 500 steps.
3. Projector and decoder learn to answer, the tower frozen: first with scenes that fill up step by
   step, then with scenes of every density. The loss counts answer tokens only.
"""

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _network import PATCH, VISUAL_TOKENS, build_model, build_processor, build_tokenizer
from PIL import Image
from scenes import CELLS, COLOURS, KINDS, SHAPES, SIDE, Cell, arrange, ask, draw
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["align_projector", "train_language", "train_vision"]

THINGS = ("empty", *SHAPES, *(str(digit) for digit in range(10)))
HUES = ("none", "white", *COLOURS)
KIND_WEIGHTS = {"what": 4, "colour": 2, "digit": 2, "exist": 2, "count": 3, "describe": 1}
TURNS = 8  # questions about one picture
MULTIPLE = 64  # lengths are padded to it: few shapes, few compiled kernels
IGNORE = -100
Grid = tuple[Cell, ...]


def _patch_cells() -> Tensor:
    """[196] the cell, 0 to 15, on which each patch is centred."""
    side, cell = SIDE // PATCH, SIDE // 4
    lines = [(patch * PATCH + PATCH // 2) // cell for patch in range(side)]
    return torch.tensor([row * 4 + column for row in lines for column in lines])


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    """[b, 3, 112, 112] in [-1, 1]."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batch(rng: random.Random, densities: Sequence[float]) -> tuple[list[Grid], Tensor]:
    grids = [arrange(rng, density) for density in densities]
    return grids, _pixels([draw(grid, rng, "train") for grid in grids])


def _rate(peak: float, step: int, steps: int, warm: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    return peak * min(1.0, (step + 1) / warm) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, parameters: Sequence[nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _mixed(arguments: argparse.Namespace) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16)


def train_vision(model: Any, arguments: argparse.Namespace, rng: random.Random) -> None:
    """Stage 1: three linear heads on the patch features predict thing, colour and cell."""
    tower, cells = model.model.vision_tower, _patch_cells()
    heads = nn.ModuleList(nn.Linear(arguments.width, classes) for classes in (len(THINGS), len(HUES), len(CELLS)))
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02)
    for step in range(arguments.vision_steps):
        grids, pixels = _batch(rng, [rng.uniform(0.35, 0.85) for _ in range(2 * arguments.batch)])
        labels = (
            torch.tensor([[THINGS.index(cell.thing) for cell in grid] for grid in grids])[:, cells],
            torch.tensor([[HUES.index(cell.colour) for cell in grid] for grid in grids])[:, cells],
            cells.expand(len(grids), -1),
        )
        with _mixed(arguments):
            features = tower(pixels).last_hidden_state[:, 1:]  # [b, 196, d]
            logits = [head(features).float().flatten(0, 1) for head in heads]
        thing, colour, cell = (functional.cross_entropy(out, label.flatten()) for out, label in zip(logits, labels, strict=True))
        _update(optimizer, thing + colour + 0.5 * cell, _rate(1.5e-3, step, arguments.vision_steps, 30), parameters)
        if (step + 1) % 25 == 0:
            shares = [(out.argmax(-1) == label.flatten()).float().mean() for out, label in zip(logits, labels, strict=True)]
            print(f"vision {step + 1}: thing {shares[0]:.3f} colour {shares[1]:.3f} cell {shares[2]:.3f} of the patches", flush=True)


def align_projector(model: Any, tokenizer: Any, arguments: argparse.Namespace, rng: random.Random) -> None:
    """Stage 2: a patch's projected feature nears the sum of the word embeddings that describe it."""
    projector, table = model.model.multi_modal_projector, model.get_input_embeddings().weight.detach()
    vocabulary, scale = tokenizer.get_vocab(), table.std()
    place = table[[vocabulary[name] for name in CELLS]]
    patches, features, targets = _patch_cells(), [], []
    for _ in range(20):
        grids, pixels = _batch(rng, [rng.uniform(0.35, 0.85) for _ in range(16)])
        with torch.no_grad(), _mixed(arguments):
            features.append(model.model.vision_tower(pixels).last_hidden_state[:, 1:].float().flatten(0, 1))
        meaning = [torch.stack([table[[vocabulary[word] for word in cell.words.split()]].sum(0) for cell in grid]) for grid in grids]
        targets.append((torch.stack(meaning) + place)[:, patches].flatten(0, 1) / scale)
    x, y = torch.cat(features), torch.cat(targets)  # [patches, d]
    _start_projector(projector, x, y * scale)
    optimizer = torch.optim.AdamW(projector.parameters())
    for step in range(arguments.align_steps):
        rows = torch.randint(len(x), (2048,))
        loss = functional.mse_loss(projector(x[rows]) / scale, y[rows])
        _update(optimizer, loss, _rate(3e-3, step, arguments.align_steps, 1), list(projector.parameters()))
        if (step + 1) % 200 == 0:
            print(f"align {step + 1}: mean squared error {loss.item():.3f}, variance {y.var().item():.2f}", flush=True)


@torch.no_grad()
def _start_projector(projector: Any, x: Tensor, y: Tensor) -> None:
    """The first linear whitens x (raw features have a few huge directions); the second is a least-squares fit to y."""
    mean = x.mean(0)
    spread, axes = torch.linalg.eigh(torch.cov((x - mean).T))
    turn = torch.linalg.qr(torch.randn(len(spread), len(spread))).Q
    whiten = turn @ torch.diag((spread.clamp_min(0) + 1e-3 * spread.max()).rsqrt()) @ axes.T
    projector.linear_1.weight.copy_(whiten)
    projector.linear_1.bias.copy_(-whiten @ mean)
    hidden = projector.act(projector.linear_1(x))
    fit = torch.linalg.lstsq(torch.cat([hidden, torch.ones(len(hidden), 1)], 1), y).solution
    projector.linear_2.weight.copy_(fit[:-1].T)
    projector.linear_2.bias.copy_(fit[-1])


def train_language(model: Any, tokenizer: Any, arguments: argparse.Namespace, rng: random.Random, *, fill: bool) -> None:
    """Stage 3: projector and decoder learn the answers.

    Args:
        model: The LLaVA; its tower gets no gradient.
        tokenizer: Words to ids.
        arguments: Steps, rates, batch, bf16.
        rng: Source of scenes and questions.
        fill: Start with sparse scenes that fill up (looking up a cell is learned there); else every density.
    """
    steps, peak = (arguments.fill_steps, arguments.fill_rate) if fill else (arguments.full_steps, arguments.full_rate)
    model.model.vision_tower.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02, betas=(0.9, 0.98))
    hits: dict[str, list[bool]] = {}
    for step in range(steps):
        top = 0.12 + 0.73 * min(1.0, step / (0.4 * steps)) if fill else 0.85
        grids, pixels = _batch(rng, [rng.uniform(0.06, top) for _ in range(arguments.batch)])
        ids, labels, kinds = _conversations(grids, tokenizer, rng)
        with _mixed(arguments):
            logits, targets = _answer_logits(model, pixels, ids, labels)
        _update(optimizer, functional.cross_entropy(logits, targets), _rate(peak, step, steps, 50), parameters)
        for kind, hit in zip(kinds, (logits.argmax(-1) == targets).tolist(), strict=True):
            hits.setdefault(kind, []).append(hit)
        if (step + 1) % 25 == 0:
            shares = " ".join(f"{kind} {sum(marks) / len(marks):.2f}" for kind, marks in sorted(hits.items()))
            print(f"{'fill' if fill else 'full'} {step + 1}: right answer tokens {shares}", flush=True)
            hits = {}


def _answer_logits(model: Any, pixels: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, words] for the answer tokens and those tokens [n]; ids hold no visual tokens yet."""
    with torch.no_grad():
        features = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    words = model.get_input_embeddings()(ids)
    embeddings = torch.cat([words[:, :2], model.model.multi_modal_projector(features), words[:, 2:]], 1)  # <s> USER: picture …
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    hidden = hidden[:, VISUAL_TOKENS + 1 : -1]  # predicts ids[:, 2:]
    asked = labels[:, 2:] != IGNORE
    return model.lm_head(hidden[asked]).float(), labels[:, 2:][asked]


def _conversations(grids: Sequence[Grid], tokenizer: Any, rng: random.Random) -> tuple[Tensor, Tensor, list[str]]:
    """Ids and labels [b, t], and each answer token's kind in reading order."""
    ids, labels, kinds = [], [], []
    for grid in grids:
        line, wanted = [tokenizer.bos_token], [False]
        for kind, question, answer in _turns(grid, rng):
            line += ["USER:", *question, "ASSISTANT:", *answer, tokenizer.eos_token]
            wanted += [False] * (len(question) + 2) + [True] * (len(answer) + 1)
            kinds += [kind] * (len(answer) + 1)
        ids.append(tokenizer.convert_tokens_to_ids(line))
        labels.append([word if want else IGNORE for word, want in zip(ids[-1], wanted, strict=True)])
    length = -(-max(map(len, ids)) // MULTIPLE) * MULTIPLE
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids])
    return padded, torch.tensor([row + [IGNORE] * (length - len(row)) for row in labels]), kinds


def _turns(grid: Grid, rng: random.Random) -> Iterator[tuple[str, list[str], list[str]]]:
    for _ in range(TURNS):
        (kind,) = rng.choices(KINDS, [KIND_WEIGHTS[kind] for kind in KINDS])
        question = ask(grid, kind, rng) or ask(grid, "what", rng)
        if question is not None:
            yield question.kind, question.text.split(), question.answer.split()


def _arguments(line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the Hugging Face checkpoint")
    parser.add_argument("--vision-steps", type=int, default=400)
    parser.add_argument("--align-steps", type=int, default=1000)
    parser.add_argument("--fill-steps", type=int, default=1400, help="with scenes that fill up")
    parser.add_argument("--full-steps", type=int, default=1300, help="with scenes of every density")
    parser.add_argument("--fill-rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--full-rate", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step; the tower takes twice as many")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16, weights in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(line)


def main(line: Sequence[str] | None = None) -> None:
    """Trains through the three stages and saves model and processor."""
    arguments = _arguments(line)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    rng = random.Random(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, arguments.width, arguments.layers, arguments.heads)
    train_vision(model, arguments, rng)
    align_projector(model, tokenizer, arguments, rng)
    train_language(model, tokenizer, arguments, rng, fill=True)
    train_language(model, tokenizer, arguments, rng, fill=False)
    model.save_pretrained(arguments.out)
    build_processor(tokenizer).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
