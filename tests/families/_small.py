"""Small random models in complete Hugging Face folders, for tests from configuration to answer.

Every folder holds config.json, model.safetensors, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja and
the image processor's file, as the hub's folders do. Weights are random but scaled so that a greedy answer depends on all that came
before it: it does not fall into a short cycle.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

__all__ = ["IMAGE_TEXT", "save_small_llava", "save_small_qwen2_5_vl", "save_small_qwen2_vl"]

DecoderName = Literal["llama", "qwen2", "qwen3", "mistral"]
TowerName = Literal["clip", "siglip"]

VOCABULARY = 320
"""Rows of the token table: some more than the tokenizer has, as in the hub's checkpoints."""

IMAGE_TEXT = {"llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>"}
"""What a prompt writes for one picture."""

_LLAVA_SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_MERGES = "t h,h e,i n,a n,e r,o n,r e,a t,e n,o r,i s,th e,Ġ the,Ġ a,Ġ w,i ng,o u,a l,Ġ s,Ġ o,Ġ c,e d,s t,a r,i t,o f,Ġ of,n g,l e,Ġ t"

_LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}:{% for c in m['content'] %} "
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_small_llava(
    folder: Path,
    decoder: DecoderName = "llama",
    tower: TowerName = "clip",
    *,
    seed: int = 0,
    layers: int = 4,
    vision_layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 84,
    tied: bool = False,
    window: int | None = None,
) -> Path:
    """Write a LLaVA.

    Args:
        folder: made if missing.
        decoder: kind of the decoder.
        tower: kind of the encoder; CLIP has a class token, SigLIP none.
        seed: of the weights.
        layers: of the decoder.
        hidden: width of the decoder.
        heads: of the decoder.
        kv_heads: of the decoder.
        vision_layers: of the encoder; the last one is left out, as in LLaVA-1.5.
        image_size: side in pixels, patches of 14: the default gives 36 visual tokens.
        tied: the head is the token table.
        window: sliding window of a Mistral or Qwen2 decoder, in tokens.

    Returns:
        The folder.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

    ids = _save_tokenizer(
        folder,
        _LLAVA_SPECIAL,
        front=True,
        template=_LLAVA_TEMPLATE,
        names={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": None},
    )
    text = _text_config(decoder, layers, hidden, (heads, kv_heads), tied, window, ids)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 3,
        "image_size": image_size,
        "patch_size": 14,
    }
    vision: Any = CLIPVisionConfig(**sizes, projection_dim=48) if tower == "clip" else SiglipVisionConfig(**sizes, vision_use_head=False)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=tied,
        image_seq_length=(image_size // 14) ** 2,
    )
    _save_model(folder, config, seed, eos=[ids["</s>"]], pad=ids["<pad>"], bos=ids["<s>"], quiet=list(ids.values()))
    _write_json(
        folder / "processor_config.json",
        {
            "image_processor": _clip_processor(image_size) if tower == "clip" else _siglip_processor(image_size),
            "image_token": "<image>",
            "num_additional_image_tokens": 1 if tower == "clip" else 0,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        },
    )
    return folder


def save_small_qwen2_vl(
    folder: Path, *, seed: int = 0, layers: int = 4, vision_layers: int = 3, hidden: int = 64, tied: bool = False, flat: bool = False
) -> Path:
    """Write a Qwen2-VL.

    Args:
        folder: made if missing.
        seed: of the weights.
        layers: of the decoder.
        hidden: width of the decoder, which has 4 heads and 2 KV heads.
        vision_layers: of the encoder.
        tied: the head is the token table.
        flat: config.json as the hub's first checkpoints have it: the decoder's keys at the top level, `rope_scaling` of type mrope.

    Returns:
        The folder. Its largest picture by default is 224x224: 64 visual tokens.
    """
    vision = {"depth": vision_layers, "embed_dim": 32, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2}
    return _save_qwen(folder, "qwen2_vl", vision, seed, layers, hidden, tied, flat)


def save_small_qwen2_5_vl(
    folder: Path, *, seed: int = 0, layers: int = 4, vision_layers: int = 4, hidden: int = 64, tied: bool = False, flat: bool = False
) -> Path:
    """Write a Qwen2.5-VL: odd layers of the encoder see everything, the others windows of 112 pixels.

    Args:
        folder: made if missing.
        seed: of the weights.
        layers: of the decoder.
        vision_layers: of the encoder.
        hidden: width of the decoder, which has 4 heads and 2 KV heads.
        tied: the head is the token table.
        flat: as in `save_small_qwen2_vl`.

    Returns:
        The folder.
    """
    full = [i for i in range(vision_layers) if i % 2]
    vision = {
        "depth": vision_layers,
        "hidden_size": 32,
        "out_hidden_size": hidden,
        "intermediate_size": 64,
        "num_heads": 2,
        "fullatt_block_indexes": full,
        "window_size": 112,
    }
    return _save_qwen(folder, "qwen2_5_vl", vision, seed, layers, hidden, tied, flat)


def _save_qwen(folder: Path, kind: str, vision: dict[str, Any], seed: int, layers: int, hidden: int, tied: bool, flat: bool) -> Path:
    from transformers import AutoConfig

    ids = _save_tokenizer(
        folder,
        _QWEN_SPECIAL,
        front=False,
        template=_QWEN_TEMPLATE,
        names={"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None},
    )
    half = hidden // 8  # half of a head's channels
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    text = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "sliding_window": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_scaling": {"type": "mrope", "mrope_section": section},
    }
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    written = {**text, "vision_config": vision, **tokens, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(kind, **json.loads(json.dumps(written)))
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    architecture = _save_model(folder, config, seed, eos=eos, pad=ids["<|endoftext|>"], bos=ids["<|endoftext|>"], quiet=list(ids.values()))
    if flat:
        _write_json(folder / "config.json", {"architectures": [architecture], "model_type": kind, "torch_dtype": "float32", **written})
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 28 * 28,
            "max_pixels": 224 * 224,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor" if kind == "qwen2_vl" else "Qwen2_5_VLProcessor",
        },
    )
    return folder


def _text_config(
    kind: DecoderName, layers: int, hidden: int, heads: tuple[int, int], tied: bool, window: int | None, ids: dict[str, int]
) -> Any:
    from transformers import AutoConfig

    options: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }
    if kind == "qwen3":
        options["head_dim"] = 24  # not hidden / heads: the configuration says so
    if kind == "mistral":
        options["sliding_window"] = window
    elif window is not None:
        options |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": layers // 2}
    return AutoConfig.for_model(kind, **options)


def _save_model(folder: Path, config: Any, seed: int, *, eos: list[int], pad: int, bos: int, quiet: list[int]) -> str:
    """Make the model with `seed`, save weights and the two configurations; returns the architecture's name."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        _scale(model, tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    finally:
        torch.set_rng_state(before)
    with torch.no_grad():
        model.get_output_embeddings().weight[quiet] *= 0.05  # an answer neither ends by itself nor holds special tokens
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=eos if len(eos) > 1 else eos[0], pad_token_id=pad, do_sample=False
    )
    model.save_pretrained(folder)
    return type(model).__name__


def _scale(model: nn.Module, tied: bool) -> None:
    """Draw every parameter anew: outputs of the order of 1 at any width, sharp attention, norms and biases that are not neutral.

    A tied token table is drawn small: else the head would answer each token with itself.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                norm = "norm" in name or "ln_" in name
                centre = 2.0 if "q_norm" in name or "k_norm" in name else 1.0
                parameter.normal_(centre if norm and name.endswith("weight") else 0.0, 0.1)
            else:
                sharp = 1.7 if any(p in name for p in ("q_proj", "k_proj")) else 1.2
                table = "embed_tokens" in name or "position_embedding" in name
                fan_in = 1 if table and not (tied and "embed_tokens" in name) else math.prod(parameter.shape[1:])
                parameter.normal_(0.0, sharp / math.sqrt(fan_in))


def _save_tokenizer(folder: Path, special: tuple[str, ...], *, front: bool, template: str, names: dict[str, str | None]) -> dict[str, int]:
    """Write a byte-level BPE tokenizer and the chat template; returns the ids of the special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = [(a, b) for a, b in (pair.split(" ") for pair in _MERGES.split(","))]
    plain = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    words = list(dict.fromkeys([*special, *plain] if front else [*plain, *special]))
    vocabulary = {word: index for index, word in enumerate(words) if front or word not in special}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            **{key: text for key, text in names.items() if text is not None},
            "additional_special_tokens": [word for word in special if word not in names.values()],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return {word: tokenizer.token_to_id(word) for word in special}


def _clip_processor(side: int) -> dict[str, object]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _siglip_processor(side: int) -> dict[str, object]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
