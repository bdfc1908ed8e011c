"""The same questions by Hugging Face alone (its processor, its `generate`) and by a bundle alone (its session)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmc_export.runtime._conversation import Conversation
from tmc_export.runtime.session import Session
from tmc_export.verify.compare import Check, compare_logits
from tmc_export.verify.tolerances import tolerance

__all__ = ["compare_with_generate"]


def compare_with_generate(session: Session, model: Path, asked: Sequence[tuple[Any, str]], steps: int) -> Iterator[Check]:
    """Ask both about PIL pictures: logits at every step along Hugging Face's answer, and the session's own answer token for token.

    Args:
        session: an uncompressed bundle.
        model: its checkpoint.
        asked: pictures and questions.
        steps: tokens compared.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    prepare = _qwen_inputs(model, whole) if whole.config.model_type.startswith("qwen") else _inputs(model)
    ends = whole.generation_config.eos_token_id
    for number, (picture, question) in enumerate(asked):
        inputs = prepare(picture, question)
        whole.generation_config.eos_token_id = None  # every step is wanted, past the end token too
        out = whole.generate(**inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)
        tokens = [int(t) for t in out.sequences[0, inputs["input_ids"].shape[1] :]]
        want = torch.cat(out.logits).float().numpy()
        session.reset()
        pixels = session.encode_images([picture])
        ids, _ = Conversation(session.tokenizer, session.template, session.program.image_text, session.program.eos).ask(
            question, pixels, True
        )
        laid = session.prompt(ids, pixels)
        name = f"question {number + 1}"
        same = laid.ids.tolist() == inputs["input_ids"][0].tolist()
        yield Check(f"{name}/prompt", None, same, "" if same else f"{laid.ids.tolist()} instead of {inputs['input_ids'][0].tolist()}")
        first = session.run_prompt(laid).logits
        got = np.stack([first, *(session.decoder.step(t) for t in tokens[:-1])])
        yield compare_logits(f"{name}/logits", got, want, tolerance("end_to_end", "float32"))
        stop = next((i + 1 for i, t in enumerate(tokens) if t in np.atleast_1d(ends)), steps)
        said = session.generate([picture], question, max_new_tokens=steps).tokens
        fine = said == tuple(tokens[:stop])
        yield Check(f"{name}/answer", None, fine, "" if fine else f"{said} instead of {tokens[:stop]}")


def _message(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def _inputs(model: Path) -> Callable[[Any, str], Any]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)

    def prepare(picture: Any, question: str) -> Any:
        text = processor.apply_chat_template(_message(question), add_generation_prompt=True, tokenize=False)
        return processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)

    return prepare


def _qwen_inputs(model: Path, whole: Any) -> Callable[[Any, str], Any]:
    """Put Qwen's processor together from its parts: the whole wants torchvision, for videos."""
    import torch
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer, pictures = AutoTokenizer.from_pretrained(model), Qwen2VLImageProcessorPil.from_pretrained(model)

    def prepare(picture: Any, question: str) -> Any:
        text = tokenizer.apply_chat_template(_message(question), add_generation_prompt=True, tokenize=False)
        seen = pictures(picture, return_tensors="pt")
        (token,) = tokenizer("<|image_pad|>", add_special_tokens=False).input_ids
        count = int(seen["image_grid_thw"].prod()) // 4
        ids = [i for t in tokenizer(text, add_special_tokens=False).input_ids for i in ([t] * count if t == token else [t])]
        given = torch.tensor([ids])
        mask = {"attention_mask": torch.ones_like(given), "mm_token_type_ids": (given == token).long()}
        return {"input_ids": given, **mask, **seen}

    return prepare
