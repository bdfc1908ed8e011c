"""Writing what was found: the reduced model, its inputs and the outputs that it should have, in polygraphy's form, and the report."""

from __future__ import annotations

import json
import shlex
from collections import OrderedDict
from pathlib import Path

from tmc_export.bundle.write import atomic_folder
from tmc_export.core.lazy import require
from tmc_export.debug.fault import Fault
from tmc_export.debug.graph import quiet

__all__ = ["REPORT", "reproduce", "write_fault"]

REPORT = "fault.json"
"""By this file a folder that may be replaced is known."""
_EXTERNAL = 64 << 20
"""Weights larger than this lie beside the model."""


def write_fault(fault: Fault, folder: Path) -> None:
    """Write `model.onnx`, `inputs.json`, `expected.json` and `fault.json`; the folder appears whole or not at all.

    Raises:
        NotABundleError: `folder` holds somebody else's files.
    """
    onnx = require("onnx", extra="export", purpose="write the reduced model")
    serde = require("polygraphy.json", extra="export", purpose="write the reduced model's inputs")
    results = require("polygraphy.comparator", extra="export", purpose="write the reduced model's outputs")
    with atomic_folder(folder, REPORT) as work, quiet():
        onnx.save(
            fault.model,
            work / "model.onnx",
            save_as_external_data=fault.model.ByteSize() > _EXTERNAL,
            location="model.data",
        )
        if fault.feed:
            serde.save_json([OrderedDict(fault.feed)], str(work / "inputs.json"))
        if fault.want:
            expected = results.RunResults()
            expected.add([OrderedDict(fault.want)], runner_name="expected")
            expected.save(str(work / "expected.json"))
        told = {**fault.to_json(), "reproduce": reproduce(fault, folder)}
        (work / REPORT).write_text(json.dumps(told, indent=1) + "\n", "utf-8")


def reproduce(fault: Fault, folder: Path) -> str:
    """Return a command that fails on the reduced model as the subgraph did; polygraphy alone runs it."""
    model = str(folder / "model.onnx")
    if fault.kind in ("parse", "build"):
        words = ["polygraphy", "convert", model, "-o", str(folder / "model.engine"), "--compute-capabilities", "8.9"]
        return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {shlex.join(words)}"
    words = ["polygraphy", "run", model, "--onnxrt"]
    if fault.feed:
        words += ["--load-inputs", str(folder / "inputs.json")]
    if fault.want:
        allowed = fault.node.allowed or 0.0
        words += ["--load-outputs", str(folder / "expected.json"), "--atol", f"{allowed:.6g}", "--rtol", "0"]
    return shlex.join(words)
