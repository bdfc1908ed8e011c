"""Random LLaVA folders in Hugging Face layout, written tensor by tensor, so that 7 billion weights take a few hundred MB of memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["QWEN2_036B", "VICUNA_7B", "write_causal_lm", "write_llava"]

QWEN2_036B: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_sliding_window": False,
}  # fmt: skip
"""The layers of Qwen2-0.5B: 0.358 billion weights. The vocabulary is 32000, so that table and head do not hide the layers."""

VICUNA_7B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001,
}  # fmt: skip
"""The decoder of LLaVA-1.5-7B."""

CLIP_LARGE_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    "projection_dim": 768,
}  # fmt: skip
CLIP_TINY_336 = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 336, "patch_size": 14,
    "projection_dim": 64,
}  # fmt: skip

_SPAN = 1 << 22
"""Values drawn at a time."""


def write_llava(
    folder: Path, text: Mapping[str, Any], vision: Mapping[str, int], dtype: str = "float32", shard_bytes: int = 5 << 30, seed: int = 0
) -> int:
    """Write a LLaVA of these sizes with random weights.

    Args:
        folder: made.
        text: configuration of the decoder, with its `model_type`.
        vision: configuration of the CLIP tower.
        dtype: `float32` or `float16`.
        shard_bytes: size of a safetensors shard.
        seed: of the weights.

    Returns:
        Bytes of the weights.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig

    options = dict(text)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=AutoConfig.for_model(options.pop("model_type"), **options),
        image_token_index=text["vocab_size"] - 1, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )  # fmt: skip
    _write_sidecars(folder, text, vision["image_size"])
    return _write_model(folder, config, AutoModelForImageTextToText, dtype, shard_bytes, seed)


def write_causal_lm(folder: Path, text: Mapping[str, Any], dtype: str = "float32", seed: int = 0) -> int:
    """Write a decoder of these sizes alone, which is what onnxruntime-genai's builder takes; returns the bytes of its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(text)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    _write_sidecars(folder, text, 336)
    return _write_model(folder, config, AutoModelForCausalLM, dtype, 5 << 30, seed)


def _write_model(folder: Path, config: Any, auto: Any, dtype: str, shard_bytes: int, seed: int) -> int:
    import torch

    with torch.device("meta"):
        model = auto.from_config(config, dtype=getattr(torch, dtype))
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shards = _shards(shapes, np.dtype(dtype).itemsize, shard_bytes)
    rng, where, total = np.random.default_rng(seed), {}, 0
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        total += _write_shard(folder / file, {n: shapes[n] for n in names}, np.dtype(dtype), rng)
        where |= dict.fromkeys(names, file)
    _json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total


def _shards(shapes: Mapping[str, tuple[int, ...]], item: int, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * item
        if filled + size > limit and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], rng: np.random.Generator) -> int:
    """Write the safetensors format: length of the header, header, tensors end to end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": {"float32": "F32", "float16": "F16"}[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for values in _values(name, shape, rng):
                out.write(values.astype(dtype).tobytes())
    return end


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Any]:
    """Matrices scaled by their inputs, norms near 1, biases small."""
    count = int(np.prod(shape))
    centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    width = 0.02 if len(shape) == 1 or "embed" in name else float(np.prod(shape[1:])) ** -0.5
    for start in range(0, count, _SPAN):
        yield centre + width * rng.standard_normal(min(_SPAN, count - start), dtype=np.float32)


def _write_sidecars(folder: Path, text: Mapping[str, Any], side: int) -> None:
    """Write a tokenizer of single bytes, the picture rule and the end token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True)
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {f"<unused{i}>": i for i in range(len(words), text["vocab_size"] - 1)}
    vocabulary["<image>"] = text["vocab_size"] - 1
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in ("<pad>", "<s>", "</s>", "<image>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    _json(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    _json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    pictures = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True, "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    _json(folder / "preprocessor_config.json", pictures)


def _json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
