"""The same questions by Hugging Face alone (its processor, its `generate`) and by a bundle alone (its session)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    whole = AutoModelForImageTextToText.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    ends = whole.generation_config.eos_token_id
    for number, (picture, question) in enumerate(asked):
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
        whole.generation_config.eos_token_id = None  # every step is wanted, past the end token too
        out = whole.generate(**inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)
        tokens = [int(t) for t in out.sequences[0, inputs["input_ids"].shape[1] :]]
        want = torch.cat(out.logits).float().numpy()
        session.reset()
        laid = session.prompt(session.chat_ids(question, 1), session.encode_images([picture]))
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
