"""Passes that rewrite the ONNX graph."""
