"""What the tests read out of a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

__all__ = ["checkpoint", "fused", "graphs", "int4_weights"]


def graphs(bundle: Path, prefix: str = "") -> dict[str, ir.Model]:
    """Name → graph, of `onnx/`."""
    found = {p.stem: ir.load(p) for p in sorted((bundle / "onnx").glob(f"{prefix}*.onnx"))}
    assert found, f"{bundle} has no graph {prefix}*"
    return found


def int4_weights(model: ir.Model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Linear's name in the graph → codes and scales, as stored."""
    found = {}
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            codes, scales = (i.const_value for i in node.inputs)
            assert codes.dtype == ir.DataType.INT4 and len(node.inputs) == 2
            assert node.attributes.get_int("axis", 1) == 0
            assert node.attributes.get_int("block_size", 0) * scales.shape[0] == codes.shape[0]
            found[node.inputs[0].name.split(".weight")[0]] = (codes.numpy().astype(np.int8), scales.numpy())
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
