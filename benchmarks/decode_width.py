"""Engine bytes over weights for decode widths 1, 2 and 4: which widths store a weight twice, by scheme.

    python benchmarks/decode_width.py

Two wide products, as of a feed-forward part, with a profile of 256 tokens and one of the decode width, under each scheme's Q/DQ nodes;
random weights. TensorRT-RTX engines for SM89, one after the other; nothing is executed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks._common import save, workplace
from tmc_export.engine import EngineOptions, build_engine
from tmc_export.engine.options import Profile

WIDTHS = (1, 2, 4)
SCHEMES = ("float16", "int8", "int8 w8a8", "int4", "fp8")
HIDDEN, WIDE, PREFILL, BLOCK = 2048, 8192, 256, 128
TWICE = 1.5
"""Bytes over weights above which they count as stored twice; kernels of two layers are a few percent."""

_CODES = {"int8": TensorProto.INT8, "int8 w8a8": TensorProto.INT8, "int4": TensorProto.INT4, "fp8": TensorProto.FLOAT8E4M3FN}


def _layer(scheme: str, number: int, rows: int, columns: int) -> tuple[list[Any], list[Any]]:
    """Nodes and initializers of `y<number> = x<number> W`, W [rows, columns]."""
    rng, n = np.random.default_rng(number), str(number)
    product, given = f"y{n}", f"x{n}"
    if scheme == "float16":
        weight = numpy_helper.from_array((rng.standard_normal((rows, columns)) / 64).astype(np.float16), f"w{n}")
        return [helper.make_node("MatMul", [given, f"w{n}"], [product])], [weight]
    count = rows * columns // (2 if scheme == "int4" else 1)
    codes = rng.integers(0, 256, count, np.uint8) & (0x77 if scheme == "fp8" else 0xFF)  # 0x7F and 0xFF are no numbers
    shape = (rows // BLOCK, columns) if scheme == "int4" else (columns,)
    data = [helper.make_tensor(f"q{n}", _CODES[scheme], [rows, columns], codes.tobytes(), raw=True)]
    data.append(numpy_helper.from_array(np.full(shape, 0.01, np.float16), f"s{n}"))
    nodes = []
    if scheme == "int8 w8a8":
        data.append(numpy_helper.from_array(np.array(0.05, np.float16), f"a{n}"))
        nodes.append(helper.make_node("QuantizeLinear", [given, f"a{n}"], [f"c{n}"], output_dtype=TensorProto.INT8))
        nodes.append(helper.make_node("DequantizeLinear", [f"c{n}", f"a{n}"], [f"d{n}"]))
        given = f"d{n}"
    blocked = {"axis": 0, "block_size": BLOCK} if scheme == "int4" else {"axis": 1}
    nodes.append(helper.make_node("DequantizeLinear", [f"q{n}", f"s{n}"], [f"w{n}"], **blocked))
    return [*nodes, helper.make_node("MatMul", [given, f"w{n}"], [product])], data


def write_graph(path: Path, scheme: str) -> int:
    """Write the graph of a scheme, symbolic in T; returns the bytes of its weights and scales."""
    first, second = _layer(scheme, 0, HIDDEN, WIDE), _layer(scheme, 1, WIDE, HIDDEN)
    middle = helper.make_node("Relu", ["y0"], ["x1"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, "T", HIDDEN]) for name in ("x0", "y1"))
    graph = helper.make_graph([*first[0], middle, *second[0]], "wide", [x], [y], first[1] + second[1])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return sum(len(tensor.raw_data) for tensor in graph.initializer)


def measure(base: Path, scheme: str) -> list[dict[str, Any]]:
    """Build the engines of a scheme; one entry per decode width."""
    path = base / f"{scheme.replace(' ', '-')}.onnx"
    weights = write_graph(path, scheme)
    found = []
    for width in WIDTHS:
        profiles = tuple(Profile(n, (("x0", (1, t, HIDDEN)),)) for n, t in (("prefill", PREFILL), ("decode", width)))
        report = build_engine(path, profiles, path.with_suffix(f".{width}.engine"), EngineOptions(capabilities=("SM89",)))
        found.append({"scheme": scheme, "width": width, "engine_bytes": report.size, "weights_bytes": weights, "version": report.version})
        print(f"  {scheme}, width {width}: {report.size / weights:.3f}", file=sys.stderr, flush=True)
        report.path.unlink()
    return found


def row_of(entries: list[dict[str, Any]]) -> dict[str, object]:
    """The row of a scheme; met where the default width 2 stores the weights once."""
    ratios = {entry["width"]: entry["engine_bytes"] / entry["weights_bytes"] for entry in entries}
    figure = "; ".join(f"width {width}: {ratio:.3f}" for width, ratio in ratios.items())
    return {"what": entries[0]["scheme"], "figure": figure, "bound": f"width 2 < {TWICE}", "ok": ratios[2] < TWICE}


def main() -> None:
    with workplace(1 << 30) as base:
        raw = [measure(base, scheme) for scheme in SCHEMES]
    what = (
        f"TensorRT-RTX {raw[0][0]['version']} engines for SM89 of two products, {HIDDEN} x {WIDE} and back, with profiles of {PREFILL} "
        "tokens and of the decode width: bytes over weights and scales. Built, not executed."
    )
    rows = [row_of(entries) for entries in raw]
    print(save("decode_width", {"what": what, "rows": rows, "raw": {"engines": [entry for entries in raw for entry in entries]}}))
    if any(not row["ok"] for row in rows):
        raise SystemExit("decode_width: a scheme's weights are stored twice at width 2; see benchmarks/README.md")


if __name__ == "__main__":
    main()
