"""Outputs that a device saved: what a bundle's recorded conversations gave there, as one `.npz`. No torch, no pickle.

`docs/outputs.md` describes the file for those who write it with code of their own. Arrays are named
`<route>.<conversation>.<turn>.<what>`; turns count from 0 as in `parity/*.npz`, `<what>` is a name of `TurnOutputs`; `meta` holds the rest
as JSON text.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from tmc_export.bundle.manifest import Manifest
from tmc_export.bundle.program import Program
from tmc_export.core.errors import ParityError, RuntimeInputError
from tmc_export.verify.compare import Check
from tmc_export.verify.play import TurnOutputs, judge_turn
from tmc_export.verify.recorded import FOLDER, Case
from tmc_export.verify.tolerances import Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["ROUTES", "Saved", "check_identity", "identity_of", "judge_saved", "output_names", "read_outputs", "write_outputs"]

VERSION = 1
"""Version of the file; a reader refuses another one."""
ROUTES = ("auto", "chunked")
"""How a conversation may be played; see `Decoder.turn`. `auto` must be there."""
_PRODUCTS = ("float32", "tf32")
_INTEGERS = ("tokens", "rows")


@dataclass(frozen=True)
class Saved:
    """What a device saved.

    Attributes:
        conversations: name → sha256 of the recorded file that was played.
        graphs: sha256 over the bundle's `onnx/`, as `identity_of` has it.
        routes: which were played.
        made_by: what played them, for people.
        arrays: by full name.
        products: what products of float32 rounded their inputs to: `float32`, or `tf32` (see `on_device`).
    """

    conversations: Mapping[str, str]
    graphs: str
    routes: tuple[str, ...]
    made_by: str
    arrays: Mapping[str, Array]
    products: str = "float32"


def identity_of(manifest: Manifest) -> tuple[dict[str, str], str]:
    """Return what ties a file of outputs to a bundle: conversation → sha256, and one sha256 over `onnx/`.

    The second is that of the lines which `sha256sum onnx/*` prints, in the order of the names' bytes.
    """
    files = sorted(manifest.files.items())
    recorded = {Path(name).stem: entry.sha256 for name, entry in files if name.startswith(f"{FOLDER}/") and name.endswith(".npz")}
    lines = [f"{entry.sha256}  {name}\n" for name, entry in files if name.startswith("onnx/")]
    return recorded, hashlib.sha256("".join(lines).encode()).hexdigest()


def output_names(program: Program, case: Case, number: int) -> set[str]:
    """Return the names that turn `number` (from 0) of a conversation has in `TurnOutputs`."""
    turn = case.turns[number]
    names = {"logits", *_INTEGERS}
    for picture, bucket in enumerate(turn.buckets):
        names.add(f"picture.{picture}.tokens")
        names |= {f"picture.{picture}.source.{n}" for n in range(len(program.vision[bucket].stages))}
    seen = case.turns[: number + 1] if program.turns == "recompute" else (turn,)
    if any(t.buckets for t in seen):  # a turn of text runs no selector
        names |= {f"kept.{cut.before_block}.{stage}" for cut in program.cuts for stage in range(len(cut.methods))}
    return names


def write_outputs(path: Path, saved: Saved) -> None:
    """Write a file of outputs in one step; equal outputs give equal bytes.

    Raises:
        RuntimeInputError: something else lies at `path`, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise RuntimeInputError(f"the folder {path.parent} of {path.name} does not exist; make it, or choose another one")
    if path.exists():
        try:
            read_outputs(path)
        except RuntimeInputError as error:
            raise RuntimeInputError(f"{path} exists and is no file of saved outputs; choose another name or remove it") from error
    meta = {
        "outputs": VERSION,
        "conversations": dict(saved.conversations),
        "graphs": saved.graphs,
        "routes": list(saved.routes),
        "made_by": saved.made_by,
        "products": saved.products,
    }
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **dict(sorted(saved.arrays.items())))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def read_outputs(path: Path) -> Saved:
    """Read a file of outputs.

    Raises:
        RuntimeInputError: it does not exist, is damaged, is something else, or has another version.
    """
    if not path.is_file():
        raise RuntimeInputError(f"there is no file {path}; on the device, write it with: tmc-export replay BUNDLE -o {path.name}")
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        meta = json.loads(str(arrays.pop("meta")))
        version = meta["outputs"]
        if version != VERSION:
            raise RuntimeInputError(f"{path} has version {version!r}, this tmc-export reads {VERSION}; write it with the same tmc-export")
        routes = tuple(str(r) for r in meta["routes"])
        conversations = {str(k): str(v) for k, v in dict(meta["conversations"]).items()}
        saved = Saved(conversations, str(meta["graphs"]), routes, str(meta["made_by"]), arrays, str(meta.get("products", "float32")))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        raise RuntimeInputError(
            f"{path} cannot be read as saved outputs ({type(error).__name__}: {' '.join(str(error).split())}); "
            "copy it again, or write it as docs/outputs.md says"
        ) from error
    if "auto" not in routes or not set(routes) <= set(ROUTES) or len(set(routes)) != len(routes):
        raise RuntimeInputError(f"{path} has the routes {list(routes)}; it takes 'auto', and 'chunked' if that was played too")
    if saved.products not in _PRODUCTS:
        raise RuntimeInputError(f"{path} says that products are {saved.products!r}; it takes {' or '.join(_PRODUCTS)}")
    return saved


def check_identity(path: Path, saved: Saved, manifest: Manifest) -> None:
    """Make sure that the outputs were made from this bundle.

    Raises:
        ParityError: other conversations were played, or other graphs played them.
    """
    recorded, graphs = identity_of(manifest)
    differing = sorted(name for name in {*recorded, *saved.conversations} if recorded.get(name) != saved.conversations.get(name))
    if differing:
        raise ParityError(
            f"{path} belongs to another bundle: its recorded conversations {', '.join(differing)} have another sha256 or are missing; "
            "play this bundle's on the device"
        )
    if saved.graphs != graphs:
        raise ParityError(
            f"{path} belongs to another bundle: the sha256 over onnx/ is {saved.graphs[:12]}, this bundle's is {graphs[:12]}; "
            "copy this bundle to the device and play it there"
        )


def judge_saved(saved: Saved, program: Program, cases: Sequence[Case], tolerance: Tolerance, precision: str) -> Iterator[Check]:
    """Compare saved outputs with the recorded reference, as `play` compares the runtime's; a missing or unknown name is a failure."""
    known: set[str] = set()
    for route in saved.routes:
        for case in cases:
            given_up = False
            for number, turn in enumerate(case.turns):
                prefix = f"{route}.{case.name}.{number}."
                known |= {name for name in saved.arrays if name.startswith(prefix)}
                if given_up:
                    continue
                label = f"{'' if route == 'auto' else route + ' '}{case.name}/turn {number + 1}"
                got = {name.removeprefix(prefix): a for name, a in saved.arrays.items() if name.startswith(prefix)}
                problem = _problem(got, output_names(program, case, number))
                if problem:
                    yield Check(label, None, False, problem)
                    continue
                found = list(judge_turn(label, got, turn, program, tolerance, precision))
                yield from found
                given_up = any(c.exceptions for c in found)
                if not given_up and got["logits"].shape == turn.expected.logits.shape:
                    yield _tokens(label, got)
    if strange := sorted(set(saved.arrays) - known):
        names = ", ".join(strange[:5])
        yield Check("names", None, False, f"{len(strange)} arrays belong to no recorded turn: {names}; write what docs/outputs.md lists")


def _problem(got: TurnOutputs, wanted: set[str]) -> str:
    """Say what names or types are wrong with a turn's arrays; empty when nothing is."""
    if missing := sorted(wanted - set(got)):
        return f"missing: {', '.join(missing)}"
    if extra := sorted(set(got) - wanted):
        return f"not an output of this bundle: {', '.join(extra)}"
    for name in sorted(wanted):
        floats = name == "logits" or (name.startswith("picture.") and name.endswith(".tokens"))
        if got[name].dtype.kind not in ("f" if floats else "iu"):
            return f"{name} is {got[name].dtype}, it must be {'float' if floats else 'integer'}"
        if name in _INTEGERS and got[name].ndim != 1:
            return f"{name} has shape {list(got[name].shape)}, it must be a vector"
    return ""


def _tokens(label: str, got: TurnOutputs) -> Check:
    """Make sure that the tokens are what the logits beside them say; equal logits may give either."""
    tokens, logits = got["tokens"], got["logits"]
    if tokens.shape[0] != logits.shape[0]:
        return Check(f"{label}/tokens", None, False, f"{tokens.shape[0]} tokens, {logits.shape[0]} steps of logits")
    if tokens.size and not (0 <= tokens.min() and tokens.max() < logits.shape[1]):
        return Check(f"{label}/tokens", None, False, f"a token lies outside the vocabulary of {logits.shape[1]}")
    wrong = np.flatnonzero(~(logits[np.arange(len(tokens)), tokens] >= logits.max(-1)))
    if not wrong.size:
        return Check(f"{label}/tokens", None, True)
    step = int(wrong[0])
    return Check(f"{label}/tokens", None, False, f"token {int(tokens[step])} at step {step}, the logits say {int(logits[step].argmax())}")
