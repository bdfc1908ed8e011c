"""What a model folder holds, told by optimum."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("optimum", reason="not run: the extra 'export' is not installed")

from tmc_export.core.errors import ModelError
from tmc_export.export.task import TASK, check_task

TINY = Path(__file__).parents[2] / "examples" / "tiny-llava"


@pytest.mark.parametrize(
    "architecture", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"]
)
def test_the_served_architectures_have_the_task(architecture: str) -> None:
    assert check_task(TINY, architecture) == TASK


def test_another_task_is_refused() -> None:
    with pytest.raises(ModelError, match="task 'text-generation'"):
        check_task(TINY, "LlamaForCausalLM")


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ModelError, match="'NoSuchModel', which this transformers does not have"):
        check_task(TINY, "NoSuchModel")
