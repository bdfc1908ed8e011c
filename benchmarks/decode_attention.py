"""Attention of a decode step on onnxruntime: `GroupQueryAttention` against `Attention` with the query heads of a key as rows.

    python benchmarks/decode_attention.py [--rounds 24] [--layers 12] [--threads 2]

Graphs of attention alone, float32, in both forms that `tmc_export/passes` writes (`fuse_decode_attention`, `attend_by_key`), both from
the standard form. The sessions take turns in one process, with the same slots' content; a time is of one layer, its row's writing and
rotation included. Slots are filled to a share, which the work of the first follows and that of the second does not. Both must give what
the standard form gives.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import median_interval, save
from tmc_export.passes.attend_by_key import LEAST_FILLED, LEAST_SHARING, LEAST_SLOTS, AttendByKeyPass
from tmc_export.passes.fuse_decode_attention import FuseDecodeAttentionPass
from tmc_export.passes.merge_reshapes import MergeReshapesPass

HEADS = {
    "Qwen2-0.5B": (14, 2, 64),
    "Qwen2-7B": (28, 4, 128),
    "Qwen2.5-14B": (40, 8, 128),
    "Llama-3.2-1B": (32, 8, 64),
    "SmolLM2-135M": (9, 3, 64),
}
"""Query heads, KV heads, channels."""
SLOTS = (704, 2048, 8192)
FILLED = (0.1, 0.5, 0.6, 0.7, 0.95)


def standard(heads: tuple[int, int, int], slots: int, layers: int) -> ir.Model:
    """Write the attention of so many layers as the export leaves it: standard operators, the heads of a key rows of one product."""
    h, g, d = heads
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray[Any, Any]] = {
        "parts": np.array([h * d, g * d, g * d]), "q": np.array([1, h, 1, d]), "k": np.array([1, g, 1, d]),
        "rows": np.array([1, g, h // g, d]),
        "flat": np.array([1, 1, h * d]), "zero": np.array([0]), "half": np.array([d // 2]), "whole": np.array([d]), "last": np.array([3]),
        "signs": np.repeat([-1.0, 1.0], d // 2).astype(np.float32), "scale": np.float32(d**-0.5), "axis": np.array([1]),
        "one": np.array([1, 1, 1, 1]), "wide": np.array([1, g, 1, 1]), "places": np.arange(slots)[None, None, None],
        "lead": np.stack([np.zeros(g, np.int64), np.arange(g)], -1)[None, :, None], "seen": np.float32(0), "unseen": np.float32(-3e38),
    }  # fmt: skip

    def node(operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, list(outputs), **attributes))
        return outputs[0]

    def rotated(x: str) -> str:
        high, low = (
            node("Slice", [x, start, end, "last"], f"{x}.{word}")
            for word, start, end in (("high", "half", "whole"), ("low", "zero", "half"))
        )
        turned = node("Mul", [node("Concat", [high, low], f"{x}.turned", axis=-1), "signed"], f"{x}.crossed")
        return node("Add", [node("Mul", [x, "cos"], f"{x}.straight"), turned], f"{x}.rotated")

    count = node("ReduceSum", [node("Cast", ["past_valid"], "flags", to=TensorProto.INT64), "axis"], "count", keepdims=1)
    column = node("Reshape", [count, "one"], "column")
    index = node("Concat", ["lead", node("Expand", [column, "wide"], "spread")], "index", axis=-1)
    mask = node("Where", [node("LessOrEqual", ["places", column], "up_to"), "seen", "unseen"], "mask")
    node("Mul", ["sin", "signs"], "signed")
    inputs = {"past_valid": [1, slots], "cos": [1, 1, 1, d], "sin": [1, 1, 1, d]}
    outputs: dict[str, list[int]] = {}
    for layer in range(layers):
        name = f"l{layer}."
        node("Split", [f"{name}qkv", "parts"], f"{name}q", f"{name}k", f"{name}v", axis=-1)
        q, k = (rotated(node("Reshape", [name + part, part], f"{name}{part}.heads")) for part in "qk")
        v = node("Reshape", [f"{name}v", "k"], f"{name}v.heads")
        key, value = (
            node("ScatterND", [f"past_key_values.{layer}.{kind}", index, row], f"slots.{layer}.{kind}")
            for kind, row in (("key", k), ("value", v))
        )
        rows = node("Mul", [node("Reshape", [q, "rows"], f"{name}rows"), "scale"], f"{name}scaled")
        scores = node("MatMul", [rows, node("Transpose", [key], f"{name}keys", perm=[0, 1, 3, 2])], f"{name}scores")
        weights = node("Softmax", [node("Add", [scores, mask], f"{name}masked")], f"{name}weights", axis=-1)
        out = node("Reshape", [node("MatMul", [weights, value], f"{name}mixed"), "flat"], f"out.{layer}")
        inputs |= {f"{name}qkv": [1, 1, (h + 2 * g) * d]} | {
            f"past_key_values.{layer}.{kind}": [1, g, slots, d] for kind in ("key", "value")
        }
        outputs |= {out: [1, 1, h * d], key: [1, g, slots, d], value: [1, g, slots, d]}
    float_, flag = TensorProto.FLOAT, TensorProto.BOOL
    graph = helper.make_graph(
        nodes, "attention",
        [helper.make_tensor_value_info(n, flag if n == "past_valid" else float_, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, float_, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))


class Session:
    """One form, with slots that its graph fills in place."""

    def __init__(self, model: ir.Model, threads: int) -> None:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or the threads of one would take the cores of the other
        self._session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        rng = np.random.default_rng(0)
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        held: dict[str, ort.OrtValue] = {}
        for value in self._session.get_inputs():
            flags = value.type == "tensor(bool)"
            array = np.zeros(value.shape, np.bool_) if flags else rng.standard_normal(value.shape).astype(np.float32)
            if value.name in ("cos", "sin"):
                array[..., value.shape[-1] // 2 :] = array[..., : value.shape[-1] // 2]
            self.arrays[value.name], held[value.name] = array, ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(value.name, held[value.name])
        for value in self._session.get_outputs():
            if value.name.startswith("slots."):
                self._binding.bind_ortvalue_output(value.name, held[value.name.replace("slots.", "past_key_values.", 1)])
            else:
                self.arrays[value.name] = np.zeros(value.shape, np.float32)
                self._binding.bind_ortvalue_output(value.name, ort.OrtValue.ortvalue_from_numpy(self.arrays[value.name]))

    def run(self) -> float:
        """Seconds of one run."""
        began = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - began


def compare(heads: tuple[int, int, int], slots: int, rounds: int, layers: int, threads: int) -> list[dict[str, Any]]:
    """Time both forms at every share of filled slots."""
    sessions = [Session(standard(heads, slots, layers), threads)]
    for rewrite in (FuseDecodeAttentionPass(), AttendByKeyPass(slots, sharing=1, slots=1)):
        model = standard(heads, slots, layers)
        if not rewrite(model).modified:
            raise SystemExit(f"{type(rewrite).__name__} left the graph as it was")
        ir.passes.Sequential(MergeReshapesPass(), RemoveUnusedNodesPass(), TopologicalSortPass())(model)
        sessions.append(Session(model, threads))
    found = []
    for share in FILLED:
        for session in sessions:
            session.arrays["past_valid"][:] = np.arange(slots) < int(slots * share)
            session.run()
        for name, array in sessions[0].arrays.items():
            if name != "past_valid" and any(np.abs(session.arrays[name] - array).max() > 1e-5 for session in sessions[1:]):
                raise SystemExit(f"{name} differs: {heads}, {slots} slots, {share:.0%} filled")
        times: list[list[float]] = [[], []]
        for number in range(rounds):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                sessions[1 + which].run()
                times[which].append(statistics.median(sessions[1 + which].run() for _ in range(5)) / layers * 1e6)
        ratios = [b / a for a, b in zip(*times, strict=True)]
        medians = [statistics.median(t) for t in times]
        found.append(
            {
                "filled": share,
                "grouped_us": medians[0],
                "rows_us": medians[1],
                "ratio": statistics.median(ratios),
                "interval": median_interval(ratios),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    rows, raw = [], {}
    for name, heads in HEADS.items():
        for slots in SLOTS:
            found = compare(heads, slots, options.rounds, options.layers, options.threads)
            raw[f"{name} {slots}"] = found
            figures = "; ".join(f"{f['filled']:.0%}: {f['ratio']:.2f} ({f['interval'][0]:.2f} to {f['interval'][1]:.2f})" for f in found)
            rows.append(
                {
                    "what": f"{name} ({heads[0]} query heads on {heads[1]}), {slots} slots: rows / grouped, by the share filled",
                    "figure": figures,
                }
            )
            print(rows[-1]["figure"], file=sys.stderr, flush=True)
    what = (
        f"Attention of a decode step on onnxruntime, {options.threads} thread(s): `Attention` with the heads that share a key as rows, "
        f"against `GroupQueryAttention`. Rows are written from {LEAST_SHARING} query heads per KV head on, where the visual tokens of a "
        f"prompt fill {LEAST_FILLED} of {LEAST_SLOTS} slots or more."
    )
    print(save("decode_attention", {"what": what, "rows": rows, "raw": raw}))


if __name__ == "__main__":
    main()
