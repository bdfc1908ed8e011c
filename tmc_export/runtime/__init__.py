"""Runs a bundle: onnxruntime, TensorRT or TensorRT-RTX. Never torch, transformers or a method."""
