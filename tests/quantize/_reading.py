"""What the tests read out of a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

__all__ = ["checkpoint", "fused", "graphs", "int4_weights", "parts_of"]


def graphs(bundle: Path, prefix: str = "") -> dict[str, ir.Model]:
    """Name → graph, of `onnx/`."""
    found = {p.stem: ir.load(p) for p in sorted((bundle / "onnx").glob(f"{prefix}*.onnx"))}
    assert found, f"{bundle} has no graph {prefix}*"
    return found


def parts_of(value: ir.Value) -> dict[str, slice]:
    """Name in the graph → columns, of a weight that may hold several side by side (`layers.0.a.weight+0.b.weight+0.c.weight`)."""
    first, *rest = (value.name or "").split("+")
    if not rest:
        return {first: slice(None)}
    names = [first, *(f"{first.split('layers.')[0]}layers.{name}" for name in rest)]
    reader = value
    while (node := next(use.node for use in reader.uses())).op_type not in ("Split", "GroupQueryAttention"):
        reader = node.outputs[0]
    if node.op_type == "Split":
        widths = node.inputs[1].const_value.numpy().tolist()
    else:
        heads, groups = (node.attributes.get_int(word, 0) for word in ("num_heads", "kv_num_heads"))
        width = value.const_value.shape[-1] // (heads + 2 * groups)
        widths = [heads * width, groups * width, groups * width]
    assert sum(widths) == value.const_value.shape[-1] and len(widths) == len(names)
    ends = np.cumsum([0, *widths])
    return {name: slice(int(a), int(b)) for name, a, b in zip(names, ends, ends[1:], strict=False)}


def int4_weights(model: ir.Model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Linear's name in the graph → codes and scales, as stored."""
    found = {}
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            codes, scales = (i.const_value for i in node.inputs)
            assert codes.dtype == ir.DataType.INT4 and len(node.inputs) == 2
            assert node.attributes.get_int("axis", 1) == 0
            assert node.attributes.get_int("block_size", 0) * scales.shape[0] == codes.shape[0]
            for name, columns in parts_of(node.inputs[0]).items():
                found[name.split(".weight")[0]] = (codes.numpy().astype(np.int8)[:, columns], scales.numpy()[:, columns])
    return found


def checkpoint(model: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(model / "model.safetensors")


def fused(file: Path, out: Path, accuracy: int) -> list[onnx.NodeProto]:
    """The nodes that onnxruntime makes of a graph."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy))
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return list(onnx.load(out, load_external_data=False).graph.node)
