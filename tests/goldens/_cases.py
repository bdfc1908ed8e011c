"""Read golden files: `<method>.npz` with `<case>/in/<name>` and `<case>/out/<name>`, and `<method>.json` with what each case is."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
SUBSET = HERE / "data"


@dataclass(frozen=True)
class Case:
    """One case of one golden file; `outputs` are those with ties to the lowest index where the file has them."""

    method: str
    name: str
    params: Mapping[str, Any]
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    raises: str | None
    exact: bool
    robust: bool
    note: str

    @property
    def id(self) -> str:
        return f"{self.method}-{self.name}"

    @property
    def decided(self) -> bool:
        """Indices may be compared exactly: the case is robust, its ties are real, or its inputs are whole numbers, which nothing rounds."""
        return self.exact or self.robust or not any(a.dtype.kind == "f" for a in self.inputs.values())

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.inputs[name]))


@dataclass(frozen=True)
class Program:
    """A case put to our method: named tensors in, the golden's outputs by name out.

    Attributes:
        inputs: what `run` takes; also the inputs of the ONNX graph.
        run: calls the method's `apply` and brings the result into the golden's form.
        skipped: golden outputs that are not compared, each with the reason.
        details: further outputs that only the comparison in PyTorch makes, because they repeat a long computation.
        tolerance: name in `TOLERANCES`, where the case needs another than `values`.
    """

    inputs: Mapping[str, Tensor]
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    skipped: Mapping[str, str] = field(default_factory=dict)
    details: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    tolerance: str = "values"


class NotCovered(Exception):
    """A case outside the method; the reason is printed at the end of the run."""


def folder() -> Path:
    """The folder of `TMC_GOLDENS`, else the subset in the repository."""
    return Path(os.environ["TMC_GOLDENS"]) if os.environ.get("TMC_GOLDENS") else SUBSET


def pairs() -> list[str]:
    return sorted(p.stem for p in folder().glob("*.json") if p.with_suffix(".npz").exists())


def adapter(method: str) -> ModuleType | None:
    """The adapter of a golden file, or None where nobody wrote one."""
    if not (HERE / "adapters" / f"{method}.py").exists():
        return None
    return importlib.import_module(f"tests.goldens.adapters.{method}")


def prepared(case: Case) -> Program:
    """The case as a program; raises `NotCovered` with the reason, or `ValueError` where our method refuses the case."""
    module = adapter(case.method)
    if module is None:
        raise NotCovered(f"no tests/goldens/adapters/{case.method}.py")
    if case.raises is not None and not case.inputs:
        if not hasattr(module, "refuse"):
            raise NotCovered("the official code fails on it, and the file carries no inputs")
        module.refuse(case)
    program: Program = module.build(case)
    return program


def _arrays(archive: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key[len(prefix) :]: archive[key] for key in archive if key.startswith(prefix)}


def load(method: str) -> list[Case]:
    """Every case of a golden file."""
    meta = json.loads((folder() / f"{method}.json").read_text())
    with np.load(folder() / f"{method}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    cases = []
    for name, about in meta["cases"].items():
        stable = _arrays(arrays, f"{name}/out_stable/")
        cases.append(
            Case(
                method=method,
                name=name,
                params={**about.get("scalar_inputs", {}), **about.get("params", {})},
                inputs=_arrays(arrays, f"{name}/in/"),
                outputs=_arrays(arrays, f"{name}/out/") | stable,
                raises=about.get("raises"),
                exact=bool(about.get("exact_arithmetic")),
                robust=bool(about.get("robust_to_2e7_perturbation")),
                note=about.get("note") or "",
            )
        )
    return cases
