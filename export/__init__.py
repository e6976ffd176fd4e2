"""GGUF, ONNX and the bundle that holds them."""
