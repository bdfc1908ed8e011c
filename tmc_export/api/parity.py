"""Parity of a bundle that is being built: the reference's answers are recorded into it, and the runtime must give them too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tmc_export.bundle.journal import Journal
from tmc_export.bundle.program import SlotCodes
from tmc_export.families._contract import ModelFiles
from tmc_export.plan._weights import weight_bytes
from tmc_export.plan.types import Plan

__all__ = ["check_recorded", "record_reference"]

_WIDEN = {"float32": 1.0, "float16": 2.0, "bfloat16": 2.0}
_HEADROOM = 1.4
"""The reference holds the weights in float32, and activations and KV beside them."""
_DONE = "reference"
"""The step of the journal that all conversations are; each is one by the name of its file."""


def record_reference(
    folder: Path,
    plan: Plan,
    files: ModelFiles,
    bundle: Path,
    fit: str | None,
    progress: Callable[[str], None],
    journal: Journal,
    codes: SlotCodes | None = None,
) -> str | None:
    """Let the PyTorch reference answer made-up conversations and keep its outputs in `<bundle>/parity/`.

    Args:
        folder: the checkpoint.
        plan: the bundle's plan.
        files: the checkpoint's JSON files.
        bundle: the folder that is being made.
        fit: the recipe's picture rule.
        progress: one line per step.
        journal: of `bundle`: answers that it says are recorded are not recorded again.
        codes: how the bundle keeps keys and values.

    Returns:
        Why it did not run, or None.
    """
    if _DONE in journal.steps:
        return None
    from tmc_export.engine import available_bytes
    from tmc_export.verify.record import record

    stored = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    plain = weight_bytes(replace(plan, dtype="float32", quantize={})).total if any(s.stored for s in plan.quantize.values()) else 0
    needed, free = int(max(stored * _WIDEN[plan.dtype], plain) * _HEADROOM), available_bytes()
    if free is not None and needed > free:
        reason = f"the reference needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        progress(f"the reference was not recorded: {reason}")
        return reason
    progress("record the reference's answers")
    record(folder, plan, files, bundle, fit, codes=codes, there=journal.steps, wrote=lambda file: journal.finish(file, [file], None))
    journal.finish(_DONE, [], None)
    return None


def check_recorded(bundle: Path, progress: Callable[[str], None]) -> dict[str, str]:
    """Play the recorded conversations through the runtime.

    Args:
        bundle: a sealed bundle with `parity/`.
        progress: one line per step.

    Returns:
        Rung → outcome, for the manifest.

    Raises:
        ParityError: an answer differs; names the first bad place.
    """
    from tmc_export.verify.ladder import recorded_ladder

    ladder = recorded_ladder(bundle, lambda rung: progress(f"verify: {rung}"))
    ladder.raise_if_failed()
    return ladder.proofs()
