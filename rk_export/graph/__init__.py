"""The rewritten model as an ONNX graph."""
