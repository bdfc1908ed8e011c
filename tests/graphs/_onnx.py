"""Export a function of named tensors to ONNX and run it in onnxruntime; exports are cached by what they depend on."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from tmc_export.export.translations import shared_translations

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
_OUT = "out/"  # an input may have the same name
ROOT = Path(__file__).resolve().parents[2]


class _Module(torch.nn.Module):
    def __init__(self, run: Run, names: list[str]) -> None:
        super().__init__()
        self.run, self.names = run, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = self.run(dict(zip(self.names, tensors, strict=True)))
        return tuple(out[name] + 0 if out[name].dtype != torch.bool else out[name] for name in sorted(out))


@functools.cache
def sources() -> str:
    """Hash of everything an export depends on but its inputs: the methods, the adapters, the exporter."""
    digest = hashlib.sha256(torch.__version__.encode() + onnx.__version__.encode())
    folders = (ROOT / "graphs", ROOT / "tests" / "goldens", ROOT / "tests" / "graphs")
    for path in sorted(p for folder in folders for p in folder.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def export(run: Run, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """Export with static shapes; outputs are named like the dictionary's keys."""
    names = sorted(inputs)
    with torch.no_grad(), warnings.catch_warnings(), shared_translations():
        warnings.simplefilter("ignore")
        outputs = [_OUT + name for name in sorted(run(inputs))]
        program = torch.onnx.export(
            _Module(run, names).eval(),
            tuple(inputs[name] for name in names),
            input_names=names,
            output_names=outputs,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def cached_export(run: Run, inputs: Mapping[str, Tensor], key: str, folder: Path) -> onnx.ModelProto:
    """`export`, kept in `folder` under a hash of `key`, the sources and the input shapes."""
    shapes = sorted((name, tuple(t.shape), str(t.dtype)) for name, t in inputs.items())
    path = folder / (hashlib.sha256(repr((key, sources(), shapes)).encode()).hexdigest()[:32] + ".onnx")
    if path.exists():
        return onnx.load(path)
    model = export(run, inputs)
    path.write_bytes(model.SerializeToString())
    return model


def execute(model: onnx.ModelProto, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Run in onnxruntime on one thread; inputs that the graph does not read are left out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return {name.removeprefix(_OUT): value for name, value in zip(names, session.run(names, feeds), strict=True)}
