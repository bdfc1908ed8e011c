"""The rung of a device: the recorded conversations on a backend other than onnxruntime's CPU path, judged by what the device computes with.

Float32 on a device is TF32: TensorRT lets products round their inputs to 10 bits of mantissa by default (`BuilderFlag.TF32`), and so does
onnxruntime's CUDA provider (`use_tf32`). That is float16's mantissa, so a float32 bundle is judged as one of float16 there. Other
precisions are judged as on the CPU path: their rounding is that of their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tmc_export.core.errors import TmcError
from tmc_export.runtime._backend import BACKENDS, PROVIDERS
from tmc_export.runtime.session import load
from tmc_export.verify.play import play
from tmc_export.verify.recorded import Case
from tmc_export.verify.rungs import Rung, not_run, rung_of
from tmc_export.verify.tolerances import Precision, tolerance

__all__ = ["NO_GPU", "RUNG", "device_precision", "device_rung"]

RUNG = "TensorRT"
"""The last rung of the ladder."""
NO_GPU = "engines are executed on the device only: run tmc-export verify there, with --backend tensorrt or tensorrt-rtx"
_AS_HALF: Mapping[str, Precision] = {"float32": "float16", "int8 slots": "int8 slots, half", "fp8 slots": "fp8 slots, half"}


def device_precision(precision: Precision) -> Precision:
    """Return the row of the tolerance tables that a bundle is judged by on a device.

    >>> device_precision("float32"), device_precision("int4")
    ('float16', 'int4')
    """
    return _AS_HALF.get(precision, precision)


def device_rung(bundle: Path, cases: Sequence[Case], precision: Precision, backend: str, provider: str = "cpu") -> Rung:
    """Play conversations on a device, whole and in chunks, along the recorded answers.

    Args:
        bundle: the folder.
        cases: what the reference answered.
        precision: row of the tolerance tables on the CPU path.
        backend: see `runtime.load`.
        provider: likewise.

    Returns:
        The rung; one that says why it did not run where the backend cannot start here, or there are no engines of this bundle for it.

    Raises:
        RuntimeInputError: the backend or provider does not exist.
        TmcError: it starts, and fails while it plays.
    """
    name = RUNG if backend != "onnxruntime" else f"onnxruntime, provider {provider}"
    if not cases:
        return not_run(name, "the bundle holds no recorded conversations; build it without --no-record, or give --model")
    try:
        session = load(bundle, backend=backend, int4_accuracy=1, provider=provider)
    except TmcError as error:
        if backend not in BACKENDS or provider not in PROVIDERS:
            raise
        return not_run(name, str(error))
    judged = device_precision(precision)
    table = tolerance("end_to_end", judged)
    checks = [*play(session, cases, table, judged)]
    checks += [replace(c, name=f"chunked {c.name}") for c in play(session, cases, table, judged, "chunked")]
    steps = sum(len(t.expected.tokens) for c in cases for t in c.turns)
    row = f"{judged}, because a device's float32 is TF32" if judged != precision else judged
    by = "" if backend == "onnxruntime" else f"by {backend}, "
    return rung_of(name, checks, f"{by}judged as {row}; {len(cases)} conversations, {steps} steps, prefilled whole and in chunks")
