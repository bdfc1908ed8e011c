"""Plans for the small LLaVA that travels in the repository, and prompts with pictures for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.verify._prompts import Planner, Prompt, Prompter
from tmc_export.families.llava import Llava
from tmc_export.plan.resolve import resolve
from tmc_export.plan.source import read_model_files
from tmc_export.plan.types import Plan
from tmc_export.recipe import load_recipe
from tmc_export.runtime._images import load_image, prepare

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-llava"
IMAGE = 4


@pytest.fixture(scope="session")
def model() -> Path:
    return MODEL


@pytest.fixture(scope="session")
def questions() -> list[dict[str, str]]:
    return list(json.loads((EXAMPLES / "pictures" / "questions.json").read_text("utf-8")))


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """`planned("- {at: …}", images=2, turns="freeze")` → a plan for the small LLaVA."""
    files = read_model_files(MODEL)

    def make(compress: str = "", images: int = 1, turns: str = "freeze", splits: Sequence[int] = ()) -> Plan:
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        lines = ["recipe: 1", "name: test", f"model: {{source: {MODEL}, dtype: float32}}"]
        lines += [f"inputs: {{images: {images}, text_tokens: 64, new_tokens: 16, turns: {turns}}}"]
        lines += ["compress:", *("  " + line for line in compress.splitlines())] if compress else []
        path.write_text("\n".join([*lines, "target: {device: cpu, runtime: onnxruntime}", ""]), "utf-8")
        return resolve(load_recipe(path), files, splits)

    return make


@pytest.fixture(scope="session")
def prompt() -> Prompter:
    """`prompt("what is at c4", ["scene-1.png"], tokens=196)` → ids in the chat form, one id per visual token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rule = Llava.image_rule(read_model_files(MODEL), (112, 112), None)

    def make(question: str, pictures: Sequence[str] = (), tokens: int = 196, first: bool = True, carry: Sequence[int] = ()) -> Prompt:
        pixels = tuple(prepare(load_image(EXAMPLES / "pictures" / name), rule) for name in pictures)
        text = ("<s>" if first else "") + " USER:" + " <image>" * len(pictures) + f" {question} ASSISTANT:"
        ids: list[int] = list(carry)
        group: list[int] = [0] * len(ids)
        picture = 0
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            picture += token == IMAGE
            ids += [token] * (tokens if token == IMAGE else 1)
            group += [picture] * tokens if token == IMAGE else [0]
        return Prompt(pixels, np.array(ids, np.int64), np.array(group, np.int64))

    return make
