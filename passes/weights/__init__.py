"""Passes that rewrite the PyTorch model, one site at a time."""
