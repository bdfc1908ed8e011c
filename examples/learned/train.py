"""Trains the weights of one learned compression method on tiny-llava's scenes; everything else stays frozen.

    OMP_NUM_THREADS=1 python examples/learned/train.py --method ldp_v2

The method takes the projector's place (`projector.replace`), as its shipped recipe says, and runs through the same `apply` that a bundle
is traced from. Encoder and decoder are frozen, so the encoder sees a pool of scenes once. The loss counts answer tokens only.

1. Start: LDPv2 gets the model's own projector and a convolution of zeros, so that it is average pooling. The resampler gets attention by
   nearness, and a least-squares fit onto the pooled tokens of the model's projector.
2. Adam with a cosine schedule. Every question about a picture stands right behind it, whatever else is asked: positions and mask are
   those of as many first turns.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "examples" / "tiny-llava"
sys.path[:0] = [str(REPOSITORY), str(TINY)]

from scenes import Cell, arrange, ask, draw  # noqa: E402

from tmc_export.core.facts import ModelFacts  # noqa: E402
from tmc_export.export.random_weights import random_weight  # noqa: E402
from tmc_export.graphs import METHODS  # noqa: E402
from tmc_export.graphs._contract import Context  # noqa: E402
from tmc_export.graphs._projector import adaptive, layer_norm  # noqa: E402
from tmc_export.graphs._resampler import sincos_positions  # noqa: E402
from tmc_export.plan.make import make_plan  # noqa: E402
from tmc_export.plan.source import read_model_files  # noqa: E402
from tmc_export.plan.types import StagePlan  # noqa: E402
from tmc_export.recipe import load_recipe  # noqa: E402

__all__ = ["FIXED", "Pool", "Setup", "compress", "exact_match", "make_pool", "make_setup", "right_and_loss", "save", "start", "train"]

KINDS = ("what", "colour", "digit", "exist", "count")
FIXED = ("attn_pool.pos_embed",)  # never trained, as in the official code
ROOM = 8  # tokens of the longest question of these kinds and its answer
IGNORE = -100
FIRST_TEST = 300_000  # the evaluations of this repository start at other seeds

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """tiny-llava, frozen, and the place of the method in it."""

    model: Any
    tokenizer: Any
    stage: StagePlan
    facts: ModelFacts


@dataclass(frozen=True)
class Pool:
    """Pictures as the frozen encoder sees them: features `[pictures, 196, c]` in float16, and what is in the cells."""

    features: Tensor
    grids: tuple[tuple[Cell, ...], ...]


# --------------------------------------------------------------------------------------------------------------- model
def recipe_path(method: str) -> Path:
    return REPOSITORY / "recipes" / f"tiny-llava-{method}-trained-fp32.yaml"


def make_setup(method: str) -> Setup:
    """Load tiny-llava, and plan the method's recipe, whose weights need not exist yet."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    recipe = load_recipe(recipe_path(method), ["compress.0.weights={random: 0}"])
    vision = make_plan(recipe, read_model_files(TINY))[0].vision[0]
    model = AutoModelForImageTextToText.from_pretrained(TINY)
    model.requires_grad_(False)
    return Setup(model.eval(), AutoTokenizer.from_pretrained(TINY), vision.stages[0], vision.facts)  # type: ignore[no-untyped-call]


def compress(setup: Setup, features: Tensor, weights: Weights) -> Tensor:
    """Return what the method makes of the encoder's tokens: `[b, n, c]` to `[b, k, d]`."""
    (b, n, _), stage = features.shape, setup.stage
    valid, source = torch.ones(b, n, dtype=torch.bool), torch.arange(n).expand(b, n)
    context = Context(layout=stage.before, facts=setup.facts, valid=valid, source=source, weights=weights)
    return METHODS.get(stage.method).apply(stage.stage, features, context, stage.config).tokens


# -------------------------------------------------------------------------------------------------------------- scenes
@torch.inference_mode()
def make_pool(setup: Setup, pictures: int, seed: int, split: str) -> Pool:
    """Draw pictures and run the encoder on them."""
    rng = random.Random(f"learned:{split}:{seed}")
    features: list[Tensor] = []
    grids: list[tuple[Cell, ...]] = []
    while len(grids) < pictures:
        some = [arrange(rng, rng.uniform(0.35, 0.85)) for _ in range(min(32, pictures - len(grids)))]
        pixels = np.stack([np.asarray(draw(grid, rng, split)) for grid in some])
        seen = setup.model.model.vision_tower(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
        features.append(seen.last_hidden_state[:, 1:].half())
        grids += some
    return Pool(torch.cat(features), tuple(grids))


def _lines(grid: Sequence[Cell], turns: int, rng: random.Random) -> Iterator[tuple[list[str], list[str]]]:
    """Yield questions with the words before and behind the start of the answer; every kind once, then any."""
    for turn in range(turns):
        kind = KINDS[turn] if turn < len(KINDS) else rng.choice(KINDS)
        question = ask(grid, kind, rng) or ask(grid, "what", rng)
        if question is not None:
            yield [*question.text.split(), "ASSISTANT:"], [*question.answer.split(), "</s>"]


def _questions(grids: Sequence[Sequence[Cell]], turns: int, setup: Setup, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Ids and labels `[b, turns, ROOM]`; a label is the token that follows."""
    ids = torch.full((len(grids), turns, ROOM), setup.tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORE)
    for i, grid in enumerate(grids):
        for j, (asked, answer) in enumerate(_lines(grid, turns, rng)):
            words = torch.tensor(setup.tokenizer.convert_tokens_to_ids([*asked, *answer]))
            ids[i, j, : len(words) - 1] = words[:-1]
            labels[i, j, len(asked) - 1 : len(words) - 1] = words[len(asked) :]
    return ids, labels


# ---------------------------------------------------------------------------------------------------------------- loss
def _side_by_side(prefix: int, turns: int) -> tuple[Tensor, Tensor]:
    """Mask `[1, 1, t, t]` and positions `[1, t]`: every question sees the prefix and itself, and follows the prefix."""
    total = prefix + turns * ROOM
    turn = torch.arange(total - prefix) // ROOM
    mine = torch.cat([torch.full((prefix,), -1), turn])
    seen = ((mine[None] == -1) | (mine[None] == mine[:, None])) & torch.ones(total, total, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(prefix), prefix + torch.arange(total - prefix) % ROOM])
    return seen[None, None], positions[None]


def right_and_loss(setup: Setup, visual: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Answer questions about compressed pictures.

    Args:
        setup: the model.
        visual: `[b, k, d]`.
        ids: of `_questions`.
        labels: of `_questions`.

    Returns:
        Whether greedy decoding gives exactly the answer (it does when every token of the answer is the likeliest after those before
        it), `[b, turns]`; and the mean loss of the answer tokens.
    """
    (b, turns, _), model = ids.shape, setup.model
    words = model.get_input_embeddings()
    begin = torch.tensor(setup.tokenizer.convert_tokens_to_ids(["<s>", "USER:"])).expand(b, -1)
    embeddings = torch.cat([words(begin), visual, words(ids.flatten(1))], 1)
    prefix = visual.shape[1] + 2
    mask, positions = _side_by_side(prefix, turns)
    seen = mask.expand(b, -1, -1, -1)
    hidden = model.model.language_model(inputs_embeds=embeddings, attention_mask=seen, position_ids=positions, use_cache=False)
    wanted = labels.flatten(1)
    logits = model.lm_head(hidden.last_hidden_state[:, prefix:]).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE)
    right = ((logits.argmax(-1) == wanted) | (wanted == IGNORE)).reshape(b, turns, ROOM).all(-1)
    return right, loss


@torch.inference_mode()
def exact_match(setup: Setup, weights: Weights, pool: Pool) -> dict[str, float]:
    """Share of right answers by kind, one question of each kind a picture (a lacking one asks "what")."""
    ids, labels = _questions(pool.grids, len(KINDS), setup, random.Random(0))
    marks = []
    for i in range(0, len(ids), 50):
        visual = compress(setup, pool.features[i : i + 50].float(), weights)
        marks.append(right_and_loss(setup, visual, ids[i : i + 50], labels[i : i + 50])[0])
    shares = torch.cat(marks).float()
    return {**dict(zip(KINDS, shares.mean(0).tolist(), strict=True)), "all": shares.mean().item()}


# --------------------------------------------------------------------------------------------------------------- start
def start(setup: Setup, pool: Pool, seed: int) -> dict[str, nn.Parameter]:
    """Return the weights that training starts from."""
    shapes = METHODS.get(setup.stage.method).weights(setup.stage.config, setup.facts)
    first = {name: torch.from_numpy(random_weight(seed, name, shape)) for name, shape in shapes.items()}
    if setup.stage.method == "ldp_v2":
        _start_ldp_v2(first, setup)
    else:
        _start_resampler(first, setup, pool)
    return {name: nn.Parameter(tensor.clone(), requires_grad=name not in FIXED) for name, tensor in first.items()}


def _start_ldp_v2(weights: dict[str, Tensor], setup: Setup) -> None:
    projector = setup.model.model.multi_modal_projector
    for layer, linear in ((0, projector.linear_1), (2, projector.linear_2)):
        weights[f"mlp.mlp.{layer}.weight"], weights[f"mlp.mlp.{layer}.bias"] = linear.weight.detach(), linear.bias.detach()
    for name in ("weight", "bias"):
        weights[f"peg.peg.0.{name}"].zero_()


def _start_resampler(weights: dict[str, Tensor], setup: Setup, pool: Pool) -> None:
    """Every head looks at what is near by the quickest sines and cosines of both axes; values are whitened; `proj` is fitted."""
    before, after = setup.stage.before, setup.stage.after
    grid, width, heads = after.grid, after.width, setup.stage.config.heads  # type: ignore[attr-defined]
    if grid is None or before.grid is None:
        raise ValueError(f"{setup.stage.method} has the layouts {before} and {after}; it needs 2 rasters")
    weights["attn_pool.pos_embed"] = sincos_positions(width, grid)
    quick = torch.cat([torch.arange(width // heads // 4) + quarter * width // 4 for quarter in range(4)])
    near = 4.5 * torch.eye(width)[quick].repeat(heads, 1)
    weights["attn_pool.attn.out_proj.weight"], weights["attn_pool.attn.out_proj.bias"] = torch.eye(width), torch.zeros(width)
    for norm in ("ln_q", "ln_kv"):
        weights[f"attn_pool.{norm}.weight"].fill_(0.1)  # nearness outweighs content
        weights[f"attn_pool.{norm}.bias"].zero_()
    weights["ln_post.bias"].fill_(1.0)  # a norm's output sums to 0: this direction carries the constant
    weights["proj"] = torch.eye(width)
    with torch.inference_mode():
        features = pool.features[:400].float()
        whiten, shift = _whitening(layer_norm(features, weights, "attn_pool.ln_kv", 1e-6).flatten(0, 1))
        weights["attn_pool.attn.in_proj_weight"] = torch.cat([near, near, whiten])
        weights["attn_pool.attn.in_proj_bias"] = torch.cat([torch.zeros(2 * width), shift])
        made = compress(setup, features, weights).flatten(0, 1).double()
        wanted = adaptive(setup.model.model.multi_modal_projector(features), before.grid, grid).flatten(0, 1).double()
        ridge = 1e-3 * len(made) * torch.eye(width, dtype=torch.float64)
        fit = torch.linalg.solve(made.T @ made + ridge, made.T @ wanted)
        weights["proj"] = fit.float()
        print(f"start: explains {1 - (made @ fit - wanted).square().mean() / wanted.var(0).mean():.3f} of the pooled tokens", flush=True)


def _whitening(x: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix and bias after which the directions of `x` `[n, c]` weigh alike (raw features have a few huge ones)."""
    mean = x.mean(0)
    spread, axes = torch.linalg.eigh(torch.cov((x - mean).T))
    whiten = torch.diag((spread.clamp_min(0) + 1e-3 * spread.max()).rsqrt()) @ axes.T
    return whiten, -whiten @ mean


# ------------------------------------------------------------------------------------------------------------ training
def train(setup: Setup, weights: Mapping[str, nn.Parameter], pool: Pool, arguments: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Train in place; yields the step and its loss."""
    rng = random.Random(f"train:{arguments.seed}")
    parameters = [weight for weight in weights.values() if weight.requires_grad]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.98))
    for step in range(arguments.steps):
        places = rng.sample(range(len(pool.grids)), min(arguments.batch, len(pool.grids)))
        ids, labels = _questions([pool.grids[i] for i in places], arguments.turns, setup, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            visual = compress(setup, pool.features[places].float(), weights)
            _, loss = right_and_loss(setup, visual, ids, labels)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, (step + 1) / 20) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / arguments.steps)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield step + 1, loss.item()


def save(weights: Weights, path: Path, prefix: str) -> None:
    """Write the weights in float32 under their official names."""
    held = {prefix + name: tensor.detach().float().contiguous() for name, tensor in weights.items()}
    save_file(held, path, metadata={"format": "pt"})


def _arguments(line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("ldp_v2", "qwen_resampler"), required=True)
    parser.add_argument("--out", type=Path, help="safetensors file (default: the one that the recipe names)")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--pictures", type=int, default=3000, help="in the pool")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--turns", type=int, default=8, help="questions about a picture a step")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16, weights in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(line)


def main(line: Sequence[str] | None = None) -> None:
    """Trains, writes the weights every 100 steps, and asks about scenes with handwriting that training never saw."""
    arguments, began = _arguments(line), time.perf_counter()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    setup, recipe = make_setup(arguments.method), load_recipe(recipe_path(arguments.method))
    source, named = recipe.compress[0].weights, recipe.weights_file(0)
    if source is None or named is None:
        raise SystemExit(f"{recipe_path(arguments.method)}: compress.0 names no weights file")
    out = arguments.out or named
    test = make_pool(setup, 200, FIRST_TEST, "heldout")
    pool = make_pool(setup, arguments.pictures, arguments.seed, "train")
    print(f"pool: {len(pool.grids)} pictures, {time.perf_counter() - began:.0f} s", flush=True)
    weights = start(setup, pool, arguments.seed)
    print(f"before: {_shares(exact_match(setup, weights, test))}", flush=True)
    lost: list[float] = []
    for step, loss in train(setup, weights, pool, arguments):
        lost.append(loss)
        if step % 25 == 0:
            print(f"{step}: loss {sum(lost[-25:]) / 25:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
        if step % 100 == 0 or step == arguments.steps:
            save(weights, out, source.prefix)
            print(f"{step}: {_shares(exact_match(setup, weights, test))}", flush=True)


def _shares(shares: Mapping[str, float]) -> str:
    return "exact match on held-out handwriting: " + " ".join(f"{kind} {share:.3f}" for kind, share in shares.items())


if __name__ == "__main__":
    main()
