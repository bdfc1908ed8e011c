"""ONNX → ONNX, one pass per file; the order is in `pipeline.py` only."""
