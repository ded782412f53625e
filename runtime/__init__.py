"""Run exported bundles on ONNX Runtime; imports neither torch nor transformers."""
