"""A tiny CLIP with random weights and a tokenizer of its own, for tests: the tower of TRIM and LLaMA-VID."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["WIDTH", "save_clip"]

WIDTH = 24
_WORDS = "what is at a1 b1 c4 how many red blue things are there colour which the picture in d3".split()


def save_clip(
    folder: Path, *, seed: int = 0, vision_width: int = 128, text_only: bool = False, width: int = WIDTH, context: int = 16
) -> Path:
    """Write a CLIP checkpoint whose visual tower is as wide as the small LLaVA's encoder.

    Args:
        folder: made when it does not exist.
        seed: of the weights.
        vision_width: channels of the visual tower.
        text_only: write the text side alone.
        width: of the joint space.
        context: places of the text tower.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(i) for i in range(33, 127)]
    tokens = list(dict.fromkeys([*letters, *(f"{c}</w>" for c in letters), *(f"{w}</w>" for w in _WORDS if len(w) > 1)]))
    merges = sorted({pair for w in _WORDS for pair in _merges(w, tokens)})
    vocab = {t: n for n, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer: Any = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context)
    text = {
        "vocab_size": len(vocab), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": context, "eos_token_id": len(vocab) - 1, "bos_token_id": len(vocab) - 2, "projection_dim": width,
    }  # fmt: skip
    vision = {
        "hidden_size": vision_width, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
        "patch_size": 8, "projection_dim": width,
    }  # fmt: skip
    config: Any = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    torch.manual_seed(seed)
    model: Any = CLIPTextModelWithProjection(config.text_config) if text_only else CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # the initial weights are so small that all questions look alike
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _merges(word: str, tokens: list[str]) -> list[tuple[str, str]]:
    """Merges from the left, whose intermediate results join the vocabulary."""
    found, left = [], word[0]
    for n, letter in enumerate(word[1:], start=1):
        right = letter + ("</w>" if n == len(word) - 1 else "")
        found.append((left, right))
        left += right
        if left not in tokens:
            tokens.append(left)
    return found
