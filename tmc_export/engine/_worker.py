"""The process that builds one engine: `python -m tmc_export.engine._worker`, a job on stdin, JSON lines on stdout.

Each engine has a process of its own: its memory returns to the system, and a crash of the builder ends one line, not the command.
A line with a flavour (`{"probe": "tensorrt"}`) answers the version and builds nothing; `{"parse": "x.onnx"}` lets TensorRT-RTX's parser
read a graph and answers why it refuses it. The one argument is the process that asked: when it is killed, this one ends too, so that no
builder writes into a folder that a next build has taken up.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

from tmc_export.core.errors import ExportError, LegalityError, MissingExtraError, ResourceError
from tmc_export.engine._build import build, refusal
from tmc_export.engine._device import cuda_device
from tmc_export.engine._types import as_tensorrt
from tmc_export.engine._wire import job_from_json, report_fields
from tmc_export.engine.options import FLAVOURS

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""


def _say(out: TextIO, **fields: object) -> None:
    out.write(json.dumps(fields) + "\n")
    out.flush()


def _local_capabilities() -> tuple[str, ...]:
    device = cuda_device()
    return (device.capability,) if device else ()


def _run(text: str, out: TextIO) -> None:
    fields = json.loads(text)
    flavour = "tensorrt-rtx" if "parse" in fields else fields["probe"] if "probe" in fields else fields["options"]["flavour"]
    try:
        trt = as_tensorrt(importlib.import_module(FLAVOURS[flavour]))
    except ImportError as error:
        raise MissingExtraError(f"'{FLAVOURS[flavour]}' cannot be imported: {error}") from error
    if "parse" in fields:
        _say(out, refusal=refusal(Path(fields["parse"]), trt))
        return
    local = _local_capabilities() if flavour == "tensorrt" else ()
    if "probe" in fields:
        _say(out, version=trt.__version__, capabilities=list(local))
        return
    job = job_from_json(text)
    report = build(job, trt, lambda phase, done, total: _say(out, phase=phase, done=done, total=total), local or job.options.capabilities)
    _say(out, report=report_fields(report))


def _end_with(parent: int) -> None:
    """Ask Linux to kill this process when the one that started it ends; elsewhere it builds to the end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)


def main() -> int:
    """Do the job on stdin; 0 also when it failed in a way that was said."""
    if len(sys.argv) > 1:
        _end_with(int(sys.argv[1]))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints goes to stderr; stdout carries JSON alone
    try:
        _run(sys.stdin.read(), out)
    except (ExportError, LegalityError, MissingExtraError, ResourceError) as error:
        _say(out, error=type(error).__name__, message=str(error))
    except OSError as error:
        _say(out, error="ResourceError", message=f"the builder cannot write or read a file: {error}; free disk space and retry")
    except MemoryError:
        _say(out, error="ResourceError", message="the builder ran out of memory; close other programs or cut the decoder into more blocks")
    out.flush()
    os._exit(0)  # tearing TensorRT down in the wrong order may crash after the work is done


if __name__ == "__main__":
    sys.exit(main())
