"""A process that builds, and kills builds where it is told: `python -m tests.api._killed`, one JSON request a line.

A build runs in the process itself ("here"), so that what it imports and traces is not paid for again, or in a fork. A fork takes the
graphs that were traced here and traces none of them again, which is most of a small build, unless it is told to. Each build says what
it does, event by event, and ends by SIGKILL before the event of the given number, in the middle of it where that is the writing of
something; or its disk is full there.

A request: {"recipe", "out", "die": number or null, "full": number or null, "trace": bool, "here": bool, "arguments": of `build`}. The
answer: {"status", "events", "error"}.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Ended", "KilledBuilds"]

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a build ended: minus the signal or the exit code, what it did, and its error."""

    status: int
    events: list[str]
    error: str

    def count(self, kind: str) -> int:
        """Count the events of a kind: `trace`, `append`, `save`, `answer`."""
        return sum(event.split()[0] == kind for event in self.events)


class KilledBuilds(AbstractContextManager["KilledBuilds"]):
    """The process, for a test."""

    def __enter__(self) -> KilledBuilds:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.api._killed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def build(
        self,
        recipe: Path,
        out: Path,
        die: int | None = None,
        *,
        full: int | None = None,
        trace: bool = False,
        here: bool = False,
        **arguments: Any,
    ) -> Ended:
        """Build; it dies at the event of number `die`, the disk is full at the one of number `full`."""
        request = {"recipe": str(recipe), "out": str(out), "die": die, "full": full, "trace": trace, "here": here, "arguments": arguments}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


# ------------------------------------------------------------------------------------------------------------- in the process
class _Events:
    """What a build says, and where it dies."""

    say = -1
    die: int | None = None
    full: int | None = None
    number = 0
    recipe = line = ""
    trace = True

    def __call__(self, text: str, half: Callable[[], object] = lambda: None) -> None:
        os.write(self.say, f"{text}\n".encode())
        if text.startswith("line export"):
            self.line = text
        here, self.number = self.number, self.number + 1
        if here in (self.die, self.full):
            half()
        if here == self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if here == self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


def _watch(event: _Events) -> None:
    """Let the places that write, trace and answer tell of themselves."""
    import onnx_ir as ir

    import tmc_export.api.exporter as exporter
    import tmc_export.bundle.work as work
    import tmc_export.verify.record as record
    from tmc_export.bundle.journal import JOURNAL, Journal
    from tmc_export.export.store import WeightStore

    append, save, capture, write_case, rename = WeightStore._append, ir.save, exporter.capture, record.write_case, Path.rename
    write_record, exchange = Journal._append, work.exchange

    def told_append(self: WeightStore, file: str, data: bytes) -> tuple[str, int, int]:
        def half() -> None:
            with (self.folder / file).open("ab") as out:
                out.write(data[: len(data) // 2])

        event(f"append {file}", half)
        place = append(self, file, data)
        event(f"appended {file}")
        return place

    def told_save(model: ir.Model, path: Path) -> None:
        event(f"save {path.name}", lambda: path.write_bytes(b"half"))
        save(model, path)
        event(f"saved {path.name}")

    def told_record(self: Journal, fields: dict[str, Any]) -> None:
        def half() -> None:
            with (self.folder / JOURNAL).open("ab") as out:
                out.write(b'0123456789abcdef {"half": ')

        kind = next(iter(fields))
        event(f"record {kind}", half)
        write_record(self, fields)
        event(f"recorded {kind}")

    traced: dict[tuple[object, ...], tuple[ir.Model, list[Any]]] = {}

    def told_capture(module: Any, inputs: Any, **more: Any) -> ir.Model:
        event("trace")
        key = (event.recipe, event.line, *more["input_names"], *(f"{x.dtype}{list(x.shape)}" for x in inputs))
        handed = module.states.handed if hasattr(module, "states") else []  # found out by tracing
        if event.trace or key not in traced:
            model = capture(module, inputs, **more)
            traced[key] = model, list(handed)
        handed[:] = traced[key][1]
        return traced[key][0].clone()  # what comes next changes it

    def told_case(folder: Path, case: Any) -> Path:
        event(f"answer {case.name}")
        path = write_case(folder, case)
        event(f"answered {case.name}")
        return path

    def told_exchange(one: Path, other: Path) -> bool:
        event("exchange")
        done = exchange(one, other)
        event("exchanged")
        return done

    def told_rename(self: Path, to: Path) -> Path:
        event(f"rename {self.suffix}")
        done = rename(self, to)
        event(f"renamed {self.suffix}")
        return done

    work.exchange = told_exchange
    WeightStore._append, ir.save, exporter.capture = told_append, told_save, told_capture  # type: ignore[method-assign]
    record.write_case, Path.rename, Journal._append = told_case, told_rename, told_record  # type: ignore[method-assign,assignment]


def _build(request: dict[str, Any], event: _Events, say: int) -> int:
    from tmc_export.api.bundling import build_bundle

    event.say, event.die, event.full, event.number = say, request["die"], request["full"], 0
    event.recipe, event.trace = request["recipe"], request["trace"]
    try:
        build_bundle(request["recipe"], request["out"], progress=lambda line: event(f"line {line}"), **request["arguments"])
    except BaseException:  # noqa: BLE001 - whatever ended it is told to the test
        os.write(say, ("error " + json.dumps(traceback.format_exc()) + "\n").encode())
        return 1
    return 0


def _answer(request: dict[str, Any], event: _Events) -> Ended:
    reading, writing = os.pipe()
    child = None if request["here"] else os.fork()
    if child == 0:
        os._exit(_build(request, event, writing))
    status = _build(request, event, writing) if child is None else 0
    os.close(writing)
    with os.fdopen(reading) as file:
        lines = file.read().splitlines()
    if child is not None:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    error = next((json.loads(line.removeprefix("error ")) for line in lines if line.startswith("error ")), "")
    return Ended(status, [line for line in lines if not line.startswith("error ")], error)


def _serve() -> None:
    event = _Events()
    _watch(event)
    for line in sys.stdin:
        print(json.dumps(vars(_answer(json.loads(line), event))), flush=True)


if __name__ == "__main__":
    _serve()
