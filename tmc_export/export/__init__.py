"""Torch modules → ONNX, without loading weights: captured with fake tensors, initializers bound to the checkpoint and streamed."""
