"""rk-export: compress, export, deploy and verify language models on ONNX Runtime."""
