"""What a model folder holds: its library and task, as `optimum`'s `TasksManager` tells them."""

from __future__ import annotations

import warnings
from pathlib import Path

from tmc_export.core.errors import ModelError
from tmc_export.core.lazy import require

__all__ = ["TASK", "check_task"]

TASK = "image-text-to-text"
"""The task whose models have an encoder, a projector and a decoder to cut."""


def check_task(folder: Path, architecture: str) -> str:
    """Return the task of a model.

    Args:
        folder: the model folder.
        architecture: its Hugging Face class, from config.json.

    Raises:
        ModelError: another library's model, a class transformers does not have, or another task.
        MissingExtraError: `optimum` is not installed.
    """
    tasks = require("optimum.exporters.tasks", extra="export", purpose="tell what a model folder holds").TasksManager
    transformers = require("transformers", extra="export", purpose="tell what a model folder holds")
    model_class = getattr(transformers, architecture, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            library = tasks.infer_library_from_model(str(folder))
            task = tasks.infer_task_from_model(model_class) if model_class is not None else None
        except (ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{folder}: optimum cannot tell what this model is: {str(error).splitlines()[0]}") from error
    if library != "transformers" or task is None:
        what = (
            f"library '{library}'" if library != "transformers" else f"architecture '{architecture}', which this transformers does not have"
        )
        raise ModelError(f"{folder}: the model is of {what}; a transformers model of the task '{TASK}' is needed")
    if task != TASK:
        raise ModelError(f"{folder}: '{architecture}' is a model of the task '{task}'; '{TASK}' is needed")
    return str(task)
